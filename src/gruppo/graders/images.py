"""What a picture is worth: scorers, and the grader that asks one of them about every picture of every group.

A *scorer* is a callable (images, prompts) -> one number per picture, None where it has nothing to say, `Abstained` where it
could not answer. `ImageScore(scorer, "clip")` makes a grader of it, and so does every scorer in `gruppo.graders.http`.

    clip = Clip("openai/clip-vit-large-patch14")
    rewards = [ImageScore(ClipScore(clip), "clip"), ImageScore(Aesthetic(clip, "sac+logos+ava1-l14-linearMSE.pth"), "aesthetic")]

Nothing is loaded before the first picture is scored.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path as File
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.graders.grade import Abstained, described
from gruppo.types import Group, GruppoError

Score = float | None | Abstained


@runtime_checkable
class Scorer(Protocol):
    """Numbers for pictures. Prompts are as many as images; a scorer that does not read them ignores them."""

    def __call__(self, images: Sequence[Any], prompts: Sequence[Any]) -> Sequence[Score] | Tensor: ...


def frames_of(output: Any, most: int = 8) -> list[Any]:
    """The pictures of a path's output in RGB: one of an image, at most `most` evenly spaced frames of a video."""
    from PIL import Image

    frames = list(output) if isinstance(output, (list, tuple)) else [output]
    bad = next((f for f in frames if not isinstance(f, Image.Image)), None)
    if bad is not None or not frames:
        found = "an empty list" if not frames else f"a {type(bad).__name__}"
        raise GruppoError(
            f"this grader looks at pictures, but a path's output is {found}, neither a PIL image nor a list of them"
        )
    if len(frames) > most:
        last = len(frames) - 1
        frames = [frames[round(i * last / (most - 1)) if most > 1 else last // 2] for i in range(most)]
    return [f.convert("RGB") for f in frames]


def text_prompt(prompt: Any) -> str:
    """The prompt that a scorer compares a picture with."""
    if not isinstance(prompt, str):
        raise GruppoError(
            f"this scorer compares a picture with its prompt, which is text elsewhere and a {type(prompt).__name__}"
        )
    return prompt


def scored(scorer: Scorer, images: Sequence[Any], prompts: Sequence[Any], batch: int = 32) -> list[Score]:
    """Ask in batches; where a batch fails, every picture of it alone, so that one bad picture costs one grade."""
    out: list[Score] = []
    for at in range(0, len(images), batch):
        out += _asked(scorer, images[at : at + batch], prompts[at : at + batch])
    return out


def _asked(scorer: Scorer, images: Sequence[Any], prompts: Sequence[Any]) -> list[Score]:
    try:
        found = scorer(images, prompts)
    except GruppoError:  # a sentence of the library: the run must stop
        raise
    except Exception as error:  # the declared boundary: somebody's scorer broke
        if len(images) == 1:
            return [Abstained(f"raised {described(error)}", error)]
        return [_asked(scorer, [i], [p])[0] for i, p in zip(images, prompts)]
    values = found.tolist() if isinstance(found, Tensor) else list(found)
    if len(values) != len(images):
        raise GruppoError(f"the scorer {described_scorer(scorer)} gave {len(values)} numbers for {len(images)} pictures")
    return [_number(v) for v in values]


def _number(value: Any) -> Score:
    if value is None or isinstance(value, Abstained):
        return value
    value = float(value)
    return value if math.isfinite(value) else Abstained(f"the scorer said {value}")


def described_scorer(scorer: Any) -> str:
    """What to call a scorer in a sentence."""
    return getattr(scorer, "__name__", None) or type(scorer).__name__


@dataclass
class ImageScore:
    """The grader of one scorer: `signal` holds its number for every path, the mean over frames where the output is a video."""

    scorer: Scorer
    signal: str
    batch: int = 32  # pictures per call
    frames: int = 8  # of a video

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    @property
    def name(self) -> str:
        return f"{self.signal} ({described_scorer(self.scorer)})"

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        shown = [[frames_of(p.output, self.frames) for p in g.paths] for g in groups]
        prompts = [g.task.prompt for g, paths in zip(groups, shown) for frames in paths for _ in frames]
        images = [f for paths in shown for frames in paths for f in frames]
        values = iter(scored(self.scorer, images, prompts, self.batch))
        return [{self.signal: [mean([next(values) for _ in frames]) for frames in paths]} for paths in shown]


def mean(values: Sequence[Score]) -> Score:
    """The mean of a video's frames; one frame without a number leaves the video without one."""
    numbers = [v for v in values if isinstance(v, float)]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else next(v for v in values if not isinstance(v, float))


# -- without a network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JpegSize:
    """Kilobytes of the picture as JPEG (DDPO's incompressibility, 2305.13301). Weigh it with -1 to ask for compressible ones."""

    quality: int = 95

    def __call__(self, images: Sequence[Any], prompts: Sequence[Any]) -> list[Score]:
        return [len(jpeg(image, self.quality)) / 1000 for image in images]


def jpeg(image: Any, quality: int = 95) -> bytes:
    """The picture as a JPEG file."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


@dataclass(frozen=True)
class Above:
    """1 where the scorer's number lies above the threshold, else 0 (DanceGRPO's binary rewards: HPS .28, CLIP .39)."""

    scorer: Scorer
    threshold: float

    def __call__(self, images: Sequence[Any], prompts: Sequence[Any]) -> list[Score]:
        return [float(v > self.threshold) if isinstance(v, float) else v for v in _asked(self.scorer, images, prompts)]


# -- CLIP and what stands on it ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Clip:
    """A CLIP model: a folder, a hub id or a loaded model. Several scorers may share one.

    `processor` is a folder or hub id when the tokenizer and the picture's preparation lie elsewhere, or a pair
    (tokenizer, image processor). The PIL image processor is used everywhere, so that a machine with torchvision gives the
    same numbers as one without.
    """

    model: Any
    processor: Any = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    truncate: bool = True  # cut prompts that are longer than CLIP reads (77 tokens); else their pictures abstain

    @cached_property
    def loaded(self) -> Any:
        """The network, ready to be asked."""
        from transformers import CLIPModel

        if not isinstance(self.model, (str, File)):
            return (self.model if self.device is None else self.model.to(self.device)).eval()
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        found = _from(CLIPModel, self.model, **({} if self.dtype is None else {"dtype": self.dtype}))
        return found.to(device).eval()

    @cached_property
    def tools(self) -> tuple[Any, Any]:
        """(tokenizer, image processor)."""
        if isinstance(self.processor, tuple):
            return self.processor
        import transformers

        source = self.processor or (self.model if isinstance(self.model, (str, File)) else self.model.name_or_path)
        if not source:
            raise GruppoError(
                "this CLIP model was built in memory and names no folder; give processor=(tokenizer, image processor)"
            )
        prepare = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        return _from(transformers.AutoTokenizer, source), _from(prepare, source)

    @torch.inference_mode()
    def images(self, images: Sequence[Any]) -> Tensor:
        """[n, width] embeddings of length 1."""
        pixels = self.tools[1](images=list(images), return_tensors="pt")["pixel_values"]
        weight = next(self.loaded.parameters())
        return _unit(self.loaded.get_image_features(pixel_values=pixels.to(weight.device, weight.dtype)))

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """[n, width] embeddings of length 1, and the number of tokens of every prompt before any cut."""
        tokenizer, longest = self.tools[0], int(self.loaded.config.text_config.max_position_embeddings)
        lengths = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
        fed = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        device = next(self.loaded.parameters()).device
        found = self.loaded.get_text_features(
            input_ids=fed["input_ids"].to(device), attention_mask=fed["attention_mask"].to(device)
        )
        return _unit(found), lengths


def _from(kind: Any, source: Any, **numbers: Any) -> Any:
    try:
        return kind.from_pretrained(source, **numbers)
    except (OSError, ValueError) as error:
        raise GruppoError(f"{str(source)!r} gives no {kind.__name__}: {described(error)}") from error


def _unit(found: Any) -> Tensor:
    features = getattr(found, "pooler_output", found).float()  # a bare tensor before transformers 5
    return features / features.norm(dim=-1, keepdim=True)


@dataclass(eq=False)
class ClipScore:
    """The cosine of picture and prompt, times `scale`; None is the model's own learned scale (its logits, near 100)."""

    clip: Clip
    scale: float | None = 1.0

    def __call__(self, images: Sequence[Any], prompts: Sequence[Any]) -> list[Score]:
        texts = [text_prompt(p) for p in prompts]
        distinct = list(dict.fromkeys(texts))  # a group shares its prompt
        known, lengths = self.clip.texts(distinct)
        at = torch.tensor([distinct.index(t) for t in texts], device=known.device)
        cosine = (self.clip.images(images) * known[at]).sum(-1)
        scale = float(self.clip.loaded.logit_scale.detach().exp()) if self.scale is None else self.scale
        longest = int(self.clip.loaded.config.text_config.max_position_embeddings)
        out: list[Score] = []
        for value, i in zip((scale * cosine).tolist(), at.tolist()):
            cut = lengths[i] > longest and not self.clip.truncate
            out.append(Abstained(f"the prompt has {lengths[i]} tokens, but CLIP reads {longest}") if cut else value)
        return out


def pick_score(
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> ClipScore:
    """PickScore (2305.01569): a CLIP trained on preferences, as logits (near 22; tables that print .22 show the cosine)."""
    return ClipScore(Clip(model, processor, device, dtype), scale=None)


@dataclass(eq=False)
class Aesthetic:
    """The head of a LAION aesthetic predictor on the picture's CLIP embedding.

    `head` is a .safetensors, .pt or .pth file, or its tensors: a chain of linear layers, taken in the order of the numbers in
    their names ("layers.0.weight", ...; the predictor has no nonlinearity between them, and its dropout is off). One layer is
    the older, linear predictor.
    """

    clip: Clip
    head: Any
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Any], prompts: Sequence[Any]) -> list[Score]:
        x = self.clip.images(images)
        if not self.layers:
            self.layers = linear_chain(self.head, x.shape[-1])
        for weight, bias in self.layers:
            x = x @ weight.to(x).T + bias.to(x)
        return list(x[:, 0].tolist())


def linear_chain(head: Any, width: int) -> list[tuple[Tensor, Tensor]]:
    """The (weight, bias) of every layer of a head; a sentence when they do not lead from `width` numbers to one."""
    tensors = _tensors(head)
    names = sorted(
        (n for n, t in tensors.items() if n.endswith("weight") and t.dim() == 2),
        key=lambda n: [int(d) for d in re.findall(r"\d+", n)],
    )
    layers = []
    for name in names:
        weight = tensors[name].float()
        bias = tensors.get(name[: -len("weight")] + "bias", torch.zeros(len(weight))).float()
        if weight.shape[1] != width:
            raise GruppoError(
                f"the head's layer {name!r} reads {weight.shape[1]} numbers, but {width} come in: another CLIP model?"
            )
        layers.append((weight, bias))
        width = len(weight)
    if not layers or width != 1:
        found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items()) or "nothing"
        raise GruppoError(f"an aesthetic head ends in one number, and this one ends in {width}; it holds: {found}")
    return layers


def _tensors(head: Any) -> dict[str, Tensor]:
    if not isinstance(head, (str, File)):
        return dict(head.state_dict() if isinstance(head, torch.nn.Module) else head)
    if not File(head).is_file():
        raise GruppoError(f"there is no file {str(head)!r} with an aesthetic head")
    if str(head).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(head)
    return torch.load(head, map_location="cpu", weights_only=True)
