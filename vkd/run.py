"""A run: recipe + data + compute, one YAML file. Loading, overrides, and errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vkd import yaml_file
from vkd.clips import ClipPlan, SplitPlan, ViewPolicy
from vkd.compute import Compute, Part, Place
from vkd.copies import Copies
from vkd.errors import ConfigError, redact
from vkd.models import ModelSpec, find
from vkd.recipes import RECIPES
from vkd.recipes.base import Recipe
from vkd.steps import Index, Pairs, Probe, Whitening
from vkd.video.access import MAX_INLINE_BYTES, Access


class Views(ViewPolicy):
    """The view policy, and how many views are labelled; `count` is not part of what labels are: views can be added."""

    count: int = Field(default=1, ge=1)

    def policy(self) -> dict[str, Any]:
        """What decides a view, without their number."""
        return self.model_dump(exclude={"count"})


class Data(Part):
    """Which videos, cut into which clips, seen how.

    With `hash` videos are known by their content, which is read whole once, and not by size and time: a local corpus may be copied
    anew. Local files are read only in `source` and in the folders of `allow`. Remote objects up to `max_inline_bytes` are read whole,
    larger ones in ranges; all decode workers together make at most `max_requests_per_s`. With `copies`, near-duplicates of the
    videos are rendered and listed beside them.
    """

    manifest: Place
    source: str | None = None
    copies: Copies | None = None
    label_from: str | None = None
    hash: bool = False
    chunk_size: int = Field(default=64, ge=1)
    clips: ClipPlan = ClipPlan()
    split: SplitPlan = SplitPlan()
    views: Views = Views()
    keep_frames: Literal["none", "jpeg", "raw"] = "none"
    max_reject_fraction: float = Field(default=0.5, gt=0, le=1)
    allow: tuple[Place, ...] = ()
    max_inline_bytes: int = Field(default=MAX_INLINE_BYTES, ge=0)
    max_requests_per_s: float | None = Field(default=None, gt=0)

    @property
    def access(self) -> Access:
        """What may be read of the world, and how."""
        how = {"max_inline_bytes": self.max_inline_bytes, "max_requests_per_s": self.max_requests_per_s}
        return Access.to(self.source, (*self.allow, *(self.copies.places if self.copies else ())), **how)

    @model_validator(mode="after")
    def _copies_of_something(self) -> Data:
        if self.copies is not None and self.source is None:
            raise ValueError("copies are made of the videos of source: name it")
        return self


class Labels(Part):
    """Who fills the store that training reads, where it lies, and how labels are encoded: `encodings` by label name, `fp16` otherwise.

    `stored`: nobody, what lacks is an error. `tee`: teachers, beside training. `live`: the same into a scratch store in the output,
    which keeps only what training has still to read: labelling leads it by at most `lead_rounds`. `window_bytes` of what is
    committed also stay in Ray's object store.
    """

    mode: Literal["stored", "tee", "live"] = "tee"
    store: Place
    encodings: Mapping[str, str] = {}
    allow_partial: bool = False
    lead_rounds: int = Field(default=2, ge=1)
    window_bytes: int = Field(default=256_000_000, ge=0)


class Train(Part):
    """How a student learns. `batch_size` counts clips over all workers, so results do not depend on their number.

    Every `check_every_steps` (0: never) it is checked whether the teacher is really used; that changes no result.
    """

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    check_every_steps: int = Field(default=500, ge=0)


class Checkpoint(Part):
    """A round, the distance between two checkpoints, ends once it has this many examples. The newest `keep` stay, and the best."""

    every_examples: int = Field(default=4096, ge=1)
    keep: int = Field(default=2, ge=1)


def _recipe(value: Any) -> Any:
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError("a recipe is a mapping with a name")
    try:
        kind = find(ModelSpec(name=value["name"]), RECIPES, "recipe")
    except ConfigError as error:
        raise ConfigError(error.what, where="recipe.name", action=error.action) from error
    if not (isinstance(kind, type) and issubclass(kind, Recipe)):
        raise ValueError(f"{value['name']!r} is no recipe")
    return kind.model_validate(value)


class Run(Part):
    """Everything that one run does; the resolved run is saved with its results."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    output: Annotated[Place, AfterValidator(lambda place: place.rstrip("/"))]
    data: Data
    labels: Labels
    recipe: Annotated[SerializeAsAny[Recipe], BeforeValidator(_recipe)]
    train: Train = Field(default_factory=Train, validate_default=True)
    checkpoint: Checkpoint = Checkpoint()
    compute: Compute = Compute()
    probe: Probe | None = None  # what `vkd run` does once labels are there, in place of a student; and so the next three
    whitening: Whitening | None = None
    pairs: Pairs | None = None
    index: Index | None = None

    @property
    def store(self) -> str:
        """Where the label sets lie that training reads."""
        return f"{self.output}/live" if self.labels.mode == "live" else self.labels.store

    @property
    def kept_frames(self) -> str:
        """How frames are kept: in mode live they are always handed on with the labels, so that a view is decoded once."""
        return "raw" if self.labels.mode == "live" and self.data.keep_frames == "none" else self.data.keep_frames

    def stored_view(self, epoch: int) -> int:
        """The view, as it is numbered in the store, that an epoch reads; `stored_view(k) % data.views.count` is what it shows."""
        return epoch if self.labels.mode == "live" else epoch % self.data.views.count

    @property
    def held_out_view(self) -> int:
        """The view, as it is numbered in the store, that evaluation reads: it shows view 0."""
        return -(-self.train.epochs // self.data.views.count) * self.data.views.count if self.labels.mode == "live" else 0

    @field_validator("train", mode="after")
    @classmethod
    def _epochs_of_phases(cls, train: Train, info: ValidationInfo) -> Train:
        """A recipe with phases says itself how many epochs there are."""
        planned = info.data["recipe"].num_epochs if "recipe" in info.data else None
        if planned is None or train.epochs == planned:
            return train
        if "epochs" in train.model_fields_set:
            raise ValueError(f"the phases of this recipe have {planned} epochs: change them there, and leave train.epochs out")
        return train.model_copy(update={"epochs": planned})

    @field_validator("recipe", mode="after")
    @classmethod
    def _phases_need_a_store(cls, recipe: Recipe, info: ValidationInfo) -> Recipe:
        if recipe.num_epochs is not None and "labels" in info.data and info.data["labels"].mode == "live":
            raise ValueError("it looks at labels again, and labels.mode live keeps none: set that to tee")
        return recipe


class Workflow(Part):
    """Runs done in order: run files (relative to the workflow's), each with its own overrides."""

    class Step(Part):
        run: str
        set: Sequence[str] = ()

    runs: Sequence[Step] = Field(min_length=1)


def load(path: str | Path, overrides: Sequence[str] = ()) -> list[Run]:
    """The runs of a run file (one) or a workflow file (several), with `key.sub=value` overrides applied to each."""
    tree = yaml_file.read(path)
    if "runs" not in tree:
        return [parse(tree, overrides, where=str(path))]
    try:
        workflow = Workflow.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, str(path), Workflow, tree) from error
    folder = Path(path).parent
    return [parse(yaml_file.read(folder / s.run), [*s.set, *overrides], where=str(folder / s.run)) for s in workflow.runs]


def load_one(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """The run of a run file. Raises ConfigError for a workflow of several."""
    runs = load(path, overrides)
    if len(runs) != 1:
        raise ConfigError(f"is a workflow of {len(runs)} runs", where=str(path), action=f"vkd run {path}, or name one of its run files")
    return runs[0]


def trees(path: str | Path, overrides: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file, YAML with overrides applied) for each run of a file that `load` takes: places are as they were written."""
    written, folder = yaml_file.read(path), Path(path).parent
    steps = Workflow.model_validate(written).runs if "runs" in written else ()
    found = [(str(folder / step.run), yaml_file.read(folder / step.run), step.set) for step in steps] or [(str(path), written, ())]
    for _, tree, own in found:
        for override in (*own, *overrides):
            _apply(tree, override)
    return [(where, tree) for where, tree, _ in found]


def parse(tree: dict[str, Any], overrides: Sequence[str] = (), where: str = "run") -> Run:
    """A checked run. Raises ConfigError that names the path of the bad key and what was expected."""
    for override in overrides:
        _apply(tree, override)
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, Run, tree) from error


def dump(run: Run) -> str:
    """The resolved run as YAML, less its secrets; loading it gives the same run, if there were none."""
    return yaml.safe_dump(_redacted(run.model_dump(mode="json")), sort_keys=False)


def _redacted(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _redacted(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_redacted(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not KEY=VALUE", action="write train.epochs=1")
    node = tree
    *parents, last = key.split(".")
    for name in parents:
        child = node[name] = {} if node.get(name) is None else node[name]  # a section that was none, too
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {name} is not a section", action="look at the run file for the keys")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{override!r}: the value is not YAML", action="quote it") from error
    yaml_file.refuse_bomb(node[last], key)


def _explain(error: ValidationError, where: str, model: type[BaseModel], tree: Mapping[str, Any]) -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1], tree)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return ConfigError(f"unknown key {path!r}", where=where, action=f"{hint}known there: {', '.join(known)}")
    got = f", not {first['input']!r}" if first["type"] != "missing" and not isinstance(first["input"], dict) else ""
    return ConfigError(f"{path}: {first['msg'].removeprefix('Value error, ')}{got}", where=where, action="mend this key")


def _keys_at(model: type[BaseModel], location: Sequence[str | int], tree: Any) -> list[str]:
    """The keys that are known at a place of the tree; those of a recipe depend on its name."""
    kind: Any = model
    for part in location:
        tree = tree[part]
        kind = get_args(kind)[0] if isinstance(part, int) else kind.model_fields[part].annotation
        kind = get_args(kind)[0] if NoneType in get_args(kind) else kind  # a section that may be left out
        if kind is Recipe:
            kind = find(ModelSpec(name=tree["name"]), RECIPES, "recipe")
    return list(kind.model_fields)
