"""
Distils a checkpoint into one of the same family with fewer layers.

The student begins with layers of its teacher, evenly spaced from the first to the last (Sanh et
al., "DistilBERT", arXiv 1910.01108; Sun et al., "Patient Knowledge Distillation", arXiv
1908.09355), and learns the teacher's answers on texts without labels:

    single label   T² · KL(teacher / T ‖ student / T), with the temperature T (Hinton et al., arXiv
                   1503.02531)
    several labels binary cross-entropy with the teacher's probabilities
    regression     mean squared error
    all            and the mean squared distance of the first token's states, normalised, between
                   each layer of the student and the teacher's layer that it came from (PKD)

Training resumes where it was interrupted.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from atomic import atomic_file, write_text_atomic
from command import BadInput, BadUsage
from export.checkpoint.loading import (
    DECODER_PREFIX,
    Checkpoint,
    build_model,
    quiet,
    read_checkpoint,
)
from export.checkpoint.reference import TextOrPair
from service.artifact import Task

DEPTH_FIELDS = ("num_hidden_layers", "n_layers", "n_layer")
"""Fields of config.json that hold the number of layers, by family."""
TEMPERATURE = 2.0
PATIENT_WEIGHT = 1.0
"""Weight of the distance of hidden states in the loss."""
SAVE_EVERY_S = 60.0
REPORT_EVERY_S = 15.0
SORTED_BATCHES = 50
"""Batches whose texts are sorted by length together, so that little of a batch is padding."""
STATE = "state.pt"
DESCRIPTION = "description.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.h5", "*.msgpack", "*.onnx")
"""Files of a checkpoint that are not copied to the student."""


@dataclass(frozen=True)
class Distillation:
    """How a student is made."""

    texts: Path
    """File of texts that the student learns on; their labels are not read."""
    layers: int
    """Layers of the student."""
    epochs: int = 5
    """Times that the student reads each text."""
    batch_size: int = 32
    learning_rate: float = 1e-4
    warm_up_share: float = 0.1
    """Share of the steps in which the learning rate rises."""
    seed: int = 0


@dataclass(frozen=True)
class Lessons:
    """What a student learns on."""

    texts: Sequence[TextOrPair]
    tokenizer: PreTrainedTokenizerFast
    task: Task
    max_tokens: int
    """Longest text that the model reads; longer ones are truncated."""


def distil(
    teacher: Checkpoint, lessons: Lessons, distillation: Distillation, folder: Path
) -> Checkpoint:
    """Return the student, which is written to `folder`; training states are kept there meanwhile.

    A folder that an interrupted call of the same teacher, texts and settings left is continued.
    Raises BadUsage if the teacher has no more layers than the student should have, and BadInput if
    its family keeps its layers elsewhere.
    """
    depth_field, depth = _depth_field(teacher), depth_of(teacher)
    if not 1 <= distillation.layers < depth:
        raise BadUsage(
            f"--layers is {distillation.layers}, and {teacher.directory} has {depth}; give 1 to"
            f" {depth - 1}."
        )
    description = {
        "teacher": teacher.weights_sha256(),
        "texts": hashlib.sha256(json.dumps(list(lessons.texts)).encode()).hexdigest(),
        "recipe": [
            distillation.layers,
            distillation.epochs,
            distillation.batch_size,
            distillation.learning_rate,
            distillation.seed,
        ],
        "task": lessons.task,
        "max_tokens": lessons.max_tokens,
        "config": hashlib.sha256((teacher.directory / "config.json").read_bytes()).hexdigest(),
        "tokenizer": hashlib.sha256(
            lessons.tokenizer.backend_tokenizer.to_str().encode()
        ).hexdigest(),
    }
    path = folder / DESCRIPTION
    if (other := _other_entries(path, description)) is not None:
        _set_aside(folder, other)
        _write_student(teacher, depth_field, depth, distillation.layers, folder)
        write_text_atomic(path, json.dumps(description))
    student = read_checkpoint(str(folder))
    training = _Training(
        build_model(teacher),
        build_model(student),
        lessons,
        distillation,
        kept_layers(depth, distillation.layers),
        folder / STATE,
    )
    weights = training.run()
    with atomic_file(folder / "model.safetensors") as draft:
        save_file(weights, draft, metadata={"format": "pt"})
    return read_checkpoint(str(folder))


def _other_entries(path: Path, description: dict[str, Any]) -> list[str] | None:
    """Return what a training that was begun before has otherwise; None if it can be continued."""
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ["beginning"]
    if before == description:
        return None
    return [name for name, value in description.items() if before.get(name) != value]


def _set_aside(folder: Path, other: Sequence[str]) -> None:
    """Move an earlier training away, whose hours may be wanted; only the last one is kept."""
    if not (folder / STATE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        return
    earlier = folder.with_name(f"{folder.name}.before")
    shutil.rmtree(earlier, ignore_errors=True)
    folder.rename(earlier)
    print(
        f"distilling: an earlier training had another {', '.join(other)}, and this one begins anew;"
        f" the earlier one is kept in {earlier}",
        flush=True,
    )


def kept_layers(depth: int, layers: int) -> list[int]:
    """Return which of the teacher's layers the student begins with: evenly spaced, with the last.

    Of twelve layers a student of six gets 1, 3, 5, 7, 9 and 11, counted from 0.
    """
    return [math.ceil((number + 1) * depth / layers) - 1 for number in range(layers)]


def depth_of(checkpoint: Checkpoint) -> int:
    """Return how many layers a checkpoint has; raises BadInput if its config.json does not say."""
    return int(checkpoint.config[_depth_field(checkpoint)])


def _depth_field(checkpoint: Checkpoint) -> str:
    """Return the field of config.json that holds the number of layers."""
    for name in DEPTH_FIELDS:
        if isinstance(checkpoint.config.get(name), int):
            return name
    raise BadInput(
        f"{checkpoint.directory / 'config.json'} has none of {', '.join(DEPTH_FIELDS)}, so its"
        " layers cannot be counted; this family cannot be distilled."
    )


def _write_student(
    teacher: Checkpoint, depth_field: str, depth: int, layers: int, folder: Path
) -> None:
    """Write a checkpoint with the teacher's tokenizer, embeddings, head, and some of its layers."""
    model = build_model(teacher)
    weights = student_weights(model, depth, layers)
    folder.mkdir(parents=True)
    for file in teacher.directory.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copy(file, folder / file.name)
    config = {
        name: value for name, value in teacher.config.items() if name != "pretraining_decoder"
    }
    config[depth_field] = layers
    config.pop("torch_dtype", None)
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def student_weights(model: nn.Module, depth: int, layers: int) -> dict[str, Tensor]:
    """Return the first weights of a student by name; raises BadInput if there is no list of layers.

    A family that uses one layer again and again, as ALBERT does, has no such list: its student
    begins with all weights and uses the layer less often.
    """
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    shared = getattr(model.config, "num_hidden_groups", None) is not None
    if not lists and not shared:
        raise BadInput(
            f"{type(model).__name__} has no list of {depth} layers; this family cannot be"
            " distilled."
        )
    number_of = {old: new for new, old in enumerate(kept_layers(depth, layers))}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix = next((each for each in lists if name.startswith(f"{each}.")), None)
        if prefix is None or shared:
            weights[name] = tensor.clone().contiguous()
            continue
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if int(number) in number_of:
            new_name = f"{prefix}.{number_of[int(number)]}.{rest}"
            weights[new_name] = tensor.clone().contiguous()
    return {name: tensor for name, tensor in weights.items() if not name.startswith(DECODER_PREFIX)}


class _Training:
    """One run of the optimizer over all epochs, in an order that its seed decides."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        lessons: Lessons,
        settings: Distillation,
        layers: list[int],
        state: Path,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.lessons, self.settings = lessons, settings
        self.layers, self.state = layers, state
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate)
        self.batches_per_epoch = math.ceil(len(lessons.texts) / settings.batch_size)
        self.steps = self.batches_per_epoch * settings.epochs
        self.accepted = _accepted_inputs(student, lessons.tokenizer)
        self._ordered_epoch = -1
        self._batches: list[list[int]] = []

    def run(self) -> dict[str, Tensor]:
        """Train to the end, from a saved state if there is one; return the student's weights."""
        step = self._load()
        started, reported, saved = time.monotonic(), time.monotonic(), time.monotonic()
        first = step
        # Dropout would make the student's answers differ from those that it is compared with.
        self.student.eval()
        while step < self.steps:
            loss = self._step(step)
            step += 1
            now = time.monotonic()
            if now - reported > REPORT_EVERY_S or step == self.steps:
                left = (now - started) / (step - first) * (self.steps - step)
                print(
                    f"distilling: {step:,} of {self.steps:,} steps, loss {loss:.4f},"
                    f" {_duration(left)} left",
                    flush=True,
                )
                reported = now
            if now - saved > SAVE_EVERY_S and step < self.steps:
                self._save(step)
                saved = now
        self._save(step)  # What follows may fail, and need not train again then.
        return {name: tensor.contiguous() for name, tensor in self.student.state_dict().items()}

    def _step(self, step: int) -> float:
        epoch, index = divmod(step, self.batches_per_epoch)
        texts = [self.lessons.texts[i] for i in self._order(epoch)[index]]
        with quiet():  # It would advise another way to pad, which cannot mix texts and pairs.
            inputs = self._encode(texts)
        with torch.no_grad():
            taught = self.teacher(**inputs, output_hidden_states=True)
        answer = self.student(**inputs, output_hidden_states=True)
        loss = answer_loss(answer.logits, taught.logits, self.lessons.task)
        loss = loss + PATIENT_WEIGHT * self._patient_loss(answer, taught)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._rate(step)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _patient_loss(self, answer: Any, taught: Any) -> Tensor:
        """Return the mean squared distance of the first token's normalised states."""
        distances = []
        # hidden_states[0] are the embeddings. The last layer's states decide the answer itself.
        for number, layer in enumerate(self.layers[:-1], 1):
            student_states, teacher_states = (
                functional.normalize(states[:, 0], dim=-1)
                for states in (answer.hidden_states[number], taught.hidden_states[layer + 1])
            )
            distances.append((student_states - teacher_states).pow(2).sum(-1).mean())
        return torch.stack(distances).mean() if distances else torch.zeros(())

    def _rate(self, step: int) -> float:
        """Return the learning rate of a step as a share of the highest one."""
        rising = max(1, round(self.settings.warm_up_share * self.steps))
        if step < rising:
            return (step + 1) / rising
        return (self.steps - step) / max(1, self.steps - rising)

    def _order(self, epoch: int) -> list[list[int]]:
        """Return the texts of each batch of an epoch: shuffled, with similar lengths together."""
        if self._ordered_epoch != epoch:
            self._ordered_epoch = epoch
            self._batches = list(self._batches_of(epoch))
        return self._batches

    def _batches_of(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.lessons.texts), generator=generator).tolist()
        size = self.settings.batch_size
        batches = []
        for begin in range(0, len(shuffled), size * SORTED_BATCHES):
            group = shuffled[begin : begin + size * SORTED_BATCHES]
            group.sort(key=lambda i: len(str(self.lessons.texts[i])))
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]

    def _encode(self, texts: Sequence[TextOrPair]) -> dict[str, Tensor]:
        tokenizer, encoded = self.lessons.tokenizer, []
        for text in texts:
            first, second = (text, None) if isinstance(text, str) else text
            tokens = tokenizer(first, second, truncation=True, max_length=self.lessons.max_tokens)
            encoded.append({name: tokens[name] for name in tokenizer.model_input_names})
        padded = tokenizer.pad(encoded, return_tensors="pt")
        return {name: padded[name] for name in self.accepted if name in padded}

    def _save(self, step: int) -> None:
        """Keep the state of a step; a file that is written half is never read."""
        state = {
            "step": step,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(self.state) as draft:
            torch.save(state, draft)

    def _load(self) -> int:
        """Return the step at which to go on."""
        if not self.state.is_file():
            return 0
        state = torch.load(self.state, weights_only=True)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
        print(f"distilling: goes on at step {step:,} of {self.steps:,}", flush=True)
        return step


def answer_loss(student: Tensor, teacher: Tensor, task: Task) -> Tensor:
    """Return the distance of a student's logits from its teacher's, (batch, labels) each."""
    if task == "regression":
        return functional.mse_loss(student, teacher)
    if task == "multi_label" or student.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    divergence = functional.kl_div(
        (student / TEMPERATURE).log_softmax(-1),
        (teacher / TEMPERATURE).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * TEMPERATURE**2


def _accepted_inputs(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the tokenizer's outputs that the model reads."""
    known = inspect.signature(model.forward).parameters
    return [
        name
        for name in tokenizer.model_input_names
        if name in known
        and not (name == "token_type_ids" and getattr(model.config, "type_vocab_size", 2) < 2)
    ]


def _duration(seconds: float) -> str:
    """Return a duration in words, as `3 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
