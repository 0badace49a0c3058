"""Tests a service with the InferenceClient of huggingface_hub."""

import sys

import huggingface_hub
from huggingface_hub import InferenceClient

url, _ = sys.argv[1:]
print(f"huggingface_hub {huggingface_hub.__version__}")
client = InferenceClient(model=url)
answer = client.text_classification("a charming and often affecting journey")
assert answer[0].label == "POSITIVE", answer
assert answer[0].score > 0.9, answer
[top] = client.text_classification("a charming and often affecting journey", top_k=1)
assert top.label == "POSITIVE", top
raw = client.text_classification("no apparent joy", function_to_apply="none")
assert raw[0].label == "NEGATIVE", raw
assert abs(raw[0].score) > 1, raw
by_name = InferenceClient(model=f"{url}/models/reviews").text_classification("no apparent joy")
assert by_name[0].label == "NEGATIVE", by_name
judge = InferenceClient(model=f"{url}/models/judge")
labels = ["charming", "apparent", "often"]
for several in (False, True):
    judged = judge.zero_shot_classification(
        "no joy", labels, multi_label=several, hypothesis_template="It is {}."
    )
    assert {each.label for each in judged} == set(labels), judged
    assert judged[0].score >= judged[1].score >= judged[2].score > 0, judged
    assert several or abs(sum(each.score for each in judged) - 1) < 1e-6, judged
tagger = InferenceClient(model=f"{url}/models/tagger")
[entity] = tagger.token_classification("a Good film", aggregation_strategy="simple")
assert (entity.entity_group, entity.start, entity.end) == ("GOOD", 2, 6), entity
assert entity.score > 0.7, entity
tokens = tagger.token_classification("a good film", aggregation_strategy="none", ignore_labels=[])
assert [token.entity for token in tokens] == ["O", "B-GOOD", "O"], tokens
