// Tests a service with the client of @huggingface/inference.
import { createRequire } from "node:module";
import { InferenceClient } from "@huggingface/inference";

const [url] = process.argv.slice(-2);
const { version } = createRequire(import.meta.url)("./node_modules/@huggingface/inference/package.json");
console.log(`@huggingface/inference ${version}`);

function check(condition, answer) {
  if (!condition) throw new Error(JSON.stringify(answer));
}

const client = new InferenceClient().endpoint(url);
const answer = await client.textClassification({ inputs: "a charming and often affecting journey" });
check(answer[0].label === "POSITIVE" && answer[0].score > 0.9, answer);
const top = await client.textClassification({ inputs: "no apparent joy", parameters: { top_k: 1 } });
check(top.length === 1 && top[0].label === "NEGATIVE", top);
const judge = new InferenceClient().endpoint(`${url}/models/judge`);
const labels = ["charming", "apparent", "often"];
const judged = await judge.zeroShotClassification({ inputs: "no joy", parameters: { candidate_labels: labels } });
const total = judged.reduce((sum, each) => sum + each.score, 0);
check(judged.length === 3 && judged[0].score >= judged[1].score && Math.abs(total - 1) < 1e-6, judged);
const tagger = new InferenceClient().endpoint(`${url}/models/tagger`);
const [entity] = await tagger.tokenClassification({ inputs: "a Good film", parameters: { aggregation_strategy: "first" } });
check(entity.entity_group === "GOOD" && entity.start === 2 && entity.end === 6 && entity.score > 0.7, entity);
