"""huggingface_hub's InferenceClient against URL."""

import sys

import huggingface_hub
from huggingface_hub import InferenceClient

url, _ = sys.argv[1:]
print(f"huggingface_hub {huggingface_hub.__version__}")
client = InferenceClient(model=url)
answer = client.text_classification("a charming and often affecting journey")
assert answer[0].label == "POSITIVE", answer
assert answer[0].score > 0.9, answer
[one] = client.text_classification("a charming and often affecting journey", top_k=1)
assert one.label == "POSITIVE", one
raw = client.text_classification("no apparent joy", function_to_apply="none")
assert raw[0].label == "NEGATIVE", raw
assert abs(raw[0].score) > 1, raw
named = InferenceClient(model=f"{url}/models/reviews").text_classification("no apparent joy")
assert named[0].label == "NEGATIVE", named
