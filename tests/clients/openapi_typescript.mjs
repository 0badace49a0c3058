// Tests a service with types that openapi-typescript generates from its OpenAPI document, and the client openapi-fetch.
//
// The program below is compiled strictly, so it fails if an operation, a field or an answer has another type; then it runs.
import { execFileSync } from "node:child_process";
import { mkdtempSync, writeFileSync, symlinkSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join, dirname } from "node:path";

const [url, model] = process.argv.slice(-2);
const require = createRequire(import.meta.url);
const installed = join(dirname(new URL(import.meta.url).pathname), "node_modules");
const { version } = require("./node_modules/openapi-typescript/package.json");
console.log(`openapi-typescript ${version}`);

const document = await (await fetch(`${url}/openapi.json`)).json();
const folder = mkdtempSync(join(tmpdir(), "openapi-"));
symlinkSync(installed, join(folder, "node_modules"));
writeFileSync(join(folder, "openapi.json"), JSON.stringify(document));
writeFileSync(join(folder, "package.json"), JSON.stringify({ type: "module" }));
const run = (program, ...args) => execFileSync(process.execPath, [join(installed, ...program), ...args], { cwd: folder, stdio: ["ignore", 2, 2] });
run(["openapi-typescript", "bin", "cli.js"], "openapi.json", "--output", "api.ts");

// Every path without a body, called by its type.
const gets = Object.entries(document.paths)
  .filter(([, methods]) => methods.get)
  .map(([path, methods]) => {
    const names = (methods.get.parameters ?? []).filter(each => each.in === "path").map(each => each.name);
    const values = Object.fromEntries(names.map(name => [name, name === "version" ? "1" : model]));
    const options = { parseAs: "text", ...(names.length ? { params: { path: values } } : {}) };
    return `await expectOk("GET ${path}", client.GET(${JSON.stringify(path)}, ${JSON.stringify(options)} as const));`;
  });
writeFileSync(join(folder, "program.ts"), `
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

const client = createClient<paths>({ baseUrl: ${JSON.stringify(url)} });
const model: string = ${JSON.stringify(model)};
const text: string = "a charming and often affecting journey";

function check(condition: boolean, what: unknown): asserts condition {
  if (!condition) throw new Error(JSON.stringify(what));
}
async function expectOk(name: string, call: Promise<{ response: Response }>): Promise<void> {
  const { response } = await call;
  check(response.ok, [name, response.status]);
}

const answer = await client.POST("/classify", { body: { input: text, model } });
const classified: components["schemas"]["ClassifyAnswer"] | undefined = answer.data;
check(classified?.data[0]?.label === "POSITIVE", answer);
const refused = await client.POST("/v1/classify", { body: { input: text, model: "nobody" } });
const error: components["schemas"]["Error"] | undefined = refused.error;
check(error?.error.code === "model_not_found", refused);
const tei = await client.POST("/predict", { body: { inputs: text } });
check(tei.response.ok, tei);
const huggingFace = await client.POST("/models/{model}", { params: { path: { model } }, body: { inputs: text } });
check(huggingFace.response.ok, huggingFace);
const root = await client.POST("/", { body: { inputs: text } });
check(root.response.ok, root);
const kserve = await client.POST("/v1/models/{model}:predict", { params: { path: { model } }, body: { instances: [text] } });
check(kserve.response.ok, kserve);
const tensor = { inputs: [{ name: "text" as const, shape: [1], datatype: "BYTES" as const, data: [text] }] };
const triton = await client.POST("/v2/models/{model}/infer", { params: { path: { model } }, body: tensor });
check(triton.response.ok, triton);
const versioned = await client.POST("/v2/models/{model}/versions/{version}/infer", { params: { path: { model, version: "1" } }, body: tensor });
check(versioned.response.ok, versioned);
${gets.join("\n")}
`);
writeFileSync(join(folder, "tsconfig.json"), JSON.stringify({
  compilerOptions: { strict: true, target: "es2022", module: "nodenext", moduleResolution: "nodenext", lib: ["es2022", "dom", "dom.iterable"], types: [] },
  files: ["program.ts"],
}));
run(["typescript", "bin", "tsc"], "--project", "tsconfig.json");
execFileSync(process.execPath, [join(folder, "program.js")], { cwd: folder, stdio: "inherit" });
