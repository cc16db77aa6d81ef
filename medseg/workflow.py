"""The schema of a workflow YAML and its loader, which knows the line and column of every field."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML

from medseg.errors import MedsegError, Problems, WorkflowError
from medseg.located_yaml import SET, FieldPath, Positions, dotted, line_of, override, place, read_yaml
from medseg.registry import did_you_mean
from medseg.wording import counted

CLOSE = 0.8
"""How alike a key of a part's entry and a field must be to be a slip, and not an argument: class_weights is no weight."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Overlap = Annotated[float, Field(ge=0, lt=1)]
Spacing = Annotated[tuple[PositiveFloat, ...], Field(min_length=2, max_length=3)]
Patch = Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=3)]


class Section(BaseModel):
    """Strict, frozen, no unknown fields."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Part(Section):
    """Something chosen from a table: ``{name, args}``, or just the name."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _just_the_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class IntensityChoice(Section):
    clip: tuple[float, float] | None = Field(None, description="lowest and highest value kept, e.g. HU")
    normalize: Literal["zscore", "foreground", "minmax", "imagenet", "none"] = Field(
        "zscore", description="imagenet: 8-bit RGB, by ImageNet's mean and deviation of each color"
    )

    @model_validator(mode="after")
    def _low_before_high(self) -> IntensityChoice:
        if self.clip and self.clip[0] >= self.clip[1]:
            raise ValueError(f"must be [lowest, highest], found {list(self.clip)}")
        return self


class Data(Section):
    manifest: str = Field(description="JSON datalist, relative to this file; ${MEDSEG_DATA} is expanded")
    spacing_mm: Spacing | Literal["median", "native"] = Field("median", description="voxel size the network sees")
    orientation: Literal["RAS", "LPS", "LAS", "RPS"] = "RAS"
    intensity: IntensityChoice | tuple[IntensityChoice, ...] = Field(
        default_factory=IntensityChoice, description="one for all channels, or a list"
    )
    select_volume: int | None = Field(None, description="which volume of a 4D file is the image")
    assume_spacing_mm: Spacing | None = Field(None, description="for files that state no spacing")
    allow_missing_slices: bool = Field(False, description="interpolate slices that a DICOM series lacks")
    cache: Literal["ram", "disk", "none"] = "ram"
    slice_axis: Literal[0, 1, 2] = Field(2, description="for 2D networks: the axis slices are cut along")
    context_slices: Annotated[int, Field(ge=0)] = Field(
        0, description="for 2D networks: neighbours on either side as channels"
    )


class NetworkChoice(Part):
    encoder_weights: str | None = Field(
        None, description="file of published encoder weights (.pth, .safetensors), relative to this file"
    )


class Init(Section):
    model: str = Field(description="model folder, run folder or MLflow run id to start from")
    skip: tuple[str, ...] = Field((), description="beginnings of weight names that start fresh, e.g. [head]")


class Ramp(Section):
    start: NotNegative = Field(0.0, alias="from")
    end: NotNegative = Field(1.0, alias="to")
    over: PositiveInt = Field(description="iterations from start to end")


class LossTerm(Part):
    weight: NotNegative | Ramp = 1.0

    @property
    def ever_counts(self) -> bool:
        """Whether its weight is not always 0."""
        return self.weight.start + self.weight.end > 0 if isinstance(self.weight, Ramp) else self.weight > 0


class Optimizer(Section):
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NotNegative = 1e-2
    momentum: Fraction = Field(0.99, description="sgd only, Nesterov")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adam and adamw only")


class Schedule(Section):
    name: Literal["poly", "cosine", "plateau", "constant"] = "poly"
    power: PositiveFloat = Field(0.9, description="poly only")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="iterations of linear warm-up")
    patience: PositiveInt = Field(5, description="plateau only: validations without improvement")
    factor: Fraction = Field(0.5, description="plateau only: what the rate is multiplied by")


class Train(Section):
    patch_size: Patch = Field(description="voxels; two entries: a 2D network on slices")
    batch_size: PositiveInt = 2
    iterations: PositiveInt = 20_000
    validate_every: PositiveInt = 500
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    foreground_ratio: Fraction = Field(0.5, description="share of patches centred on an organ")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    clip_grad_norm: PositiveFloat | None = 12.0
    accumulate: PositiveInt = 1
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    compile: Literal["auto", False] = Field("auto", description="compiling is not there yet")
    early_stop: PositiveInt | None = Field(None, description="validations without improvement")
    deep_supervision: bool = False
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the averaged weights; 0: none")
    seed: Annotated[int, Field(ge=0)] = 0


class Validate(Section):
    fold: Annotated[int, Field(ge=0)] = 0
    metrics: tuple[str, ...] = Field(
        ("dice", "iou", "hd95"), description="of the table at the end, see medseg metrics; dice is always there"
    )
    overlap: Overlap = 0.25
    max_cases: PositiveInt = Field(20, description="during training; all cases at the end")
    unions: dict[str, tuple[int, ...]] = Field(
        default_factory=dict, description="label values also scored together, e.g. {whole_liver: [1, 2]}"
    )


class Infer(Section):
    overlap: Overlap = 0.5
    weighting: Literal["gaussian", "constant"] = "gaussian"
    mirror_axes: tuple[Literal[0, 1, 2], ...] = Field((), description="axes mirrored at prediction, averaged")
    crop: Literal["air", "body", "none"] = Field(
        "air",
        description="CT and MR: air passes over windows without any of the patient, body puts them on the box around him",
    )
    postprocess: dict[str, Any] | Literal["auto"] = Field(
        default_factory=dict,
        description="{keep_largest: [organ], min_volume_ml: {organ: ml}, fill_holes: [organ]}, in the order wanted; "
        "crf: {theta_beta: 0.5, ...}, or {} for the usual numbers, makes labels follow the image before these; "
        "auto: chosen at the end of a training on the held-out cases",
    )

    @property
    def steps(self) -> dict[str, Any]:
        """The post-processing that is known before a training."""
        return {} if self.postprocess == "auto" else self.postprocess


class Track(Section):
    experiment: str | None = Field(None, description="MLflow experiment; the workflow's name if not given")
    uri: str | None = Field(None, description="MLflow tracking URI; sqlite:///mlflow.db if not given")
    tensorboard: bool = Field(False, description="write TensorBoard's event files into the run folder too")


class Workflow(Section):
    """Everything a training needs, as the YAML says it."""

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    data: Data
    network: NetworkChoice
    init: Init | None = None
    loss: Annotated[tuple[LossTerm, ...], Field(min_length=1)] = (LossTerm(name="dice"), LossTerm(name="cross_entropy"))
    augment: Literal["none", "default", "strong"] | tuple[Part, ...] = "default"
    train: Train
    validate_: Validate = Field(default_factory=Validate, alias="validate")
    infer: Infer = Field(default_factory=Infer)
    track: Track = Field(default_factory=Track)

    @field_validator("loss")
    @classmethod
    def _something_to_learn(cls, loss: tuple[LossTerm, ...]) -> tuple[LossTerm, ...]:
        if not any(term.ever_counts for term in loss):
            raise ValueError("all weights are 0, so nothing would be learned; give one of them more")
        return loss

    _file: Path = PrivateAttr(default=Path("workflow.yaml"))
    _positions: Positions = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Workflow:
        """Read a workflow.

        Args:
            path: The YAML file.
            overrides: ``section.key=value`` each, the value in YAML.

        Raises:
            WorkflowError: If the file cannot be read or is not plain YAML.
            Problems: If fields are unknown, missing or of the wrong type: all of them at once.
        """
        plain, positions = read_yaml(path)
        if "training" in plain and "labels" in plain:
            message = "is a manifest; give a workflow (YAML) whose data.manifest names it, or check it: medseg check"
            raise WorkflowError("E-WORKFLOW", f"{message} {path}", where=str(path))
        for assignment in overrides:
            override(plain, positions, assignment)
        try:
            workflow = cls.model_validate_json(json.dumps(plain, default=str))
        except ValidationError as error:
            raise Problems(_explain(error, positions, path)) from None
        workflow._file = path
        workflow._positions = positions
        return workflow

    @property
    def file(self) -> Path:
        """The YAML this came from."""
        return self._file

    def where(self, *field: str | int) -> str:
        """``file:line:column section.key`` of a field, or of the closest section that the file has."""
        return f"{place(field, self._positions, self._file)} {dotted(field)}"

    @contextmanager
    def blamed(self, *field: str | int) -> Iterator[None]:
        """Say of errors raised inside which field of the workflow, and so which line, led to them."""
        try:
            yield
        except MedsegError as error:
            if isinstance(error, Problems) or (error.where and error.where.startswith((str(self._file), SET))):
                raise
            if error.where:
                error.message = f"{error.where}: {error.message}"
            error.where = self.where(*field)
            raise

    def to_yaml(self) -> str:
        """The resolved workflow, defaults spelled out."""
        stream = io.StringIO()
        YAML().dump(self.model_dump(mode="json", by_alias=True), stream)
        return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a workflow, for completion in editors."""
    return Workflow.model_json_schema(by_alias=True)


def _explain(error: ValidationError, positions: Mapping[FieldPath, str], path: Path) -> list[MedsegError]:
    """What is wrong, in the order of the file; of a union's branches only the one that went furthest."""
    found = [(tuple(part for part in item["loc"] if _is_field(part)), item) for item in error.errors()]
    told = {at for at, item in found if item["type"] != "model_type"}  # of ``weight: -1`` not that a ramp is a mapping
    deepest = [
        (at, item)
        for at, item in found
        if not any(at == other[: len(at)] and at != other for other, _ in found)
        and not (item["type"] == "model_type" and at in told)
    ]
    in_order = sorted(deepest, key=lambda entry: line_of(place(entry[0], positions, path)))
    return [
        WorkflowError("E-WORKFLOW", _message(at, item), where=f"{place(at, positions, path)} {dotted(at)}")
        for at, item in in_order
    ]


def _message(at: FieldPath, item: Any) -> str:
    kind, found = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return _unknown_field(at)
    if kind == "missing":
        return "is missing; a workflow must state it"
    if kind == "value_error":  # of a validator above, which says all
        return str(item["ctx"]["error"])
    if kind == "too_short":
        remedy = "; write loss: [dice]" if at == ("loss",) else ""
        return f"must have at least {counted(item['ctx']['min_length'], 'value')}, found {found!r}{remedy}"
    message = f"{_readable(item)}, found {found!r}"
    if isinstance(found, str) and _is_number(found):
        return f"{message}; write the number without quotes"
    if isinstance(found, str | dict) and kind == "tuple_type":
        return f"{message}; write {at[-1]}: [{found if isinstance(found, str) else '{…}'}]"
    if isinstance(found, str) and kind == "literal_error":
        return message + did_you_mean(found, item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return message


def _readable(item: Any) -> str:
    message = str(item["msg"]).replace("Input should be", "must be").replace("Input must be", "must be")
    return message.replace("a valid array", "a list")


def _unknown_field(at: FieldPath) -> str:
    """Which field was meant; in a part's entry it may well be one of the part's own arguments."""
    key, section = str(at[-1]), _section(at[:-1])
    fields = _names(section)
    if section and issubclass(section, Part) and not get_close_matches(key, fields, cutoff=CLOSE):
        return f"not a field (these are {', '.join(fields)}); if it is an argument, write args: {{{key}: …}}"
    return f"not a field{did_you_mean(key, fields)}"


def _is_field(part: str | int) -> bool:
    """Whether a step of pydantic's location is a key of the YAML (and not the name of a union's branch)."""
    branches = {
        "bool",
        "int",
        "float",
        "str",
        "none",
        "Ramp",
        "IntensityChoice",
        "constrained-int",
        "constrained-float",
    }
    return isinstance(part, int) or not (part in branches or "[" in part or "(" in part)


def _section(at: FieldPath) -> Any:
    """The section at a path; None if there is none."""
    model: Any = Workflow
    for part in at:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        model = next((kind for kind in _models(fields[part].annotation)), None) if part in fields else None
        if model is None:
            return None
    return model


def _names(section: Any) -> list[str]:
    return [f.alias or name for name, f in section.model_fields.items()] if section else []


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
