"""params.yaml as typed, validated values: one model a section, one line for what is wrong."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ringmo.environment import shown
from ringmo.errors import BadInput

SCHEMA = 1
MAX_DEPTH = 100  # of what a YAML file nests; ours have six
MAX_SIDE = 4096  # pixels of a tile, and of what a model reads at once

Share = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
CropScale = tuple[Ratio, Ratio]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class About(Section):
    """What is said of one source because its files do not say it.

    masks: how its masks are coded: `auto`, `index` (numbers of classes as they are), `binary`,
    a published coding or one of ingest.mask_codings. mask_files: patterns of the files that are
    masks, height_files: of those that are heights, where folders' names do not say so.
    vector_class: the attribute of the vectors that is their class. licence: what its owner allows,
    in words for the model's card. generated: it shows made-up ground, so that a model trained on it
    never replaces one trained on real imagery.
    """

    sensor: str | None = None
    layout: Literal[
        "auto", "classes", "masks", "change", "voc", "dota", "fair1m", "coco", "vectors", "height"
    ] = "auto"
    masks: str = "auto"
    mask_files: list[str] = []
    height_files: list[str] = []
    vector_class: str | None = None
    licence: str | None = None
    generated: bool = False


MASK_CODINGS = (
    *("auto", "binary", "index", "loveda", "potsdam", "vaihingen", "isaid", "sen1floods11"),
)


class Ingest(Section):
    sources: list[str] = Field(min_length=1)
    about: dict[str, About] = {}
    mask_codings: dict[str, dict[str, int | list[int] | list[list[int]]]] = {}
    dask: str | None = None
    workers: Literal["auto"] | Positive = "auto"
    labels: Literal["auto", "none"] = "auto"
    include: list[str] = Field(["*"], min_length=1)
    exclude: list[str] = []
    endpoint: str | None = None
    tile_size: int = Field(256, ge=16, le=MAX_SIDE)
    stride: Annotated[int, Field(ge=1, le=MAX_SIDE)] | None = None
    gsd_m: Annotated[float, Field(gt=0)] | None = None
    max_nodata_share: Share = 0.5
    max_bad_share: Share = 0.1
    shard_mb: float = Field(64, gt=0)

    @model_validator(mode="after")
    def _known_codings(self) -> "Ingest":
        if self.mask_codings:
            from ringmo.data import codings

            for name, classes in self.mask_codings.items():
                if name in (*MASK_CODINGS, "zero_one") or name.startswith(codings.VECTORS):
                    raise ValueError(f"mask_codings: `{name}` is built in: choose another name")
                try:
                    codings.own(name, classes)
                except ValueError as error:
                    raise ValueError(f"mask_codings: {error}") from None
        known = (*MASK_CODINGS, *self.mask_codings)
        for source, about in self.about.items():
            if about.masks not in known:
                raise ValueError(
                    f"about: {source}: masks: `{about.masks}` is no coding ({', '.join(known)})"
                )
        return self


class Sensor(Section):
    """Bands in order, and how their pixels become a model's input.

    dtype is that of the files' pixels: files of float64 count as float32, and complex ones of any
    size as complex64, of which the power |z|² is decoded as float32. What is decoded is multiplied
    by scale, has offset added, becomes decibels and is clipped, in that order
    (`ringmo.data.values`). mean and std, one a band, are in the units after these steps; null
    stands for those of the training tiles, which `select` finds.
    """

    bands: list[str] = Field(min_length=1)
    dtype: Literal["uint8", "uint16", "int16", "float32", "complex64"]
    scale: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    offset: FiniteFloat = 0.0
    decibels: bool = False
    clip: tuple[FiniteFloat, FiniteFloat] | None = None
    mean: list[FiniteFloat] | None
    std: list[Annotated[FiniteFloat, Field(gt=0)]] | None

    @model_validator(mode="after")
    def _makes_sense(self) -> "Sensor":
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are both given, or both null")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip is [lowest, highest], found {list(self.clip)}")
        if self.mean is None and self.clip is None and self.dtype != "uint8":
            raise ValueError(
                f"mean and std are null, so that pixels of {self.dtype} need clip: [lowest, "
                f"highest], the range in which tiles are measured"
            )
        for numbers in (self.mean, self.std):
            if numbers is not None and len(numbers) != len(self.bands):
                raise ValueError("mean and std need one value for each band")
        return self

    @property
    def decoded(self) -> str:
        """The dtype of its pixels once they are decoded."""
        return "float32" if self.dtype == "complex64" else self.dtype

    @property
    def plain(self) -> bool:
        """Whether a model's values are the decoded pixels as they are."""
        return (self.scale, self.offset, self.decibels, self.clip) == (1.0, 0.0, False, None)

    @property
    def steps(self) -> list[Any]:
        """What is done to decoded pixels before normalisation."""
        clip = None if self.clip is None else list(self.clip)
        return [self.scale, self.offset, self.decibels, clip]

    @property
    def reading(self) -> list[Any]:
        """All that decides what ingest writes of a tile of this sensor.

        Measures of 8-bit pixels are of them as they are; of all others, in the normalisation's
        range.
        """
        steps = [] if self.plain else self.steps
        return [
            self.bands,
            self.dtype,
            *steps,
            *([] if self.dtype == "uint8" else [self.mean, self.std]),
        ]

    def described(self) -> dict[str, Any]:
        """As plain values, without what has its default: what a bundle holds."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def visible(self) -> list[int] | None:
        """The red, green and blue bands; None where the sensor has not all three.

        Numbered bands are Sentinel-2's, or Landsat 8's and 9's.
        """
        for colours in (["red", "green", "blue"], ["B04", "B03", "B02"], ["B4", "B3", "B2"]):
            if set(colours) <= set(self.bands):
                return [self.bands.index(name) for name in colours]
        return None

    @property
    def shown(self) -> list[int]:
        """The bands that a picture shows as red, green and blue, or the one it shows as grey."""
        return self.visible or ([0, 1, 2] if len(self.bands) >= 3 else [0])


class Split(Section):
    by: Literal["place", "block", "published"] = "place"
    test: float = Field(0.2, gt=0, lt=1)
    val: float = Field(0.1, gt=0, lt=1)
    near_duplicate_bits: int = Field(3, ge=0, le=3)
    seed: int = 42

    @model_validator(mode="after")
    def _train_left(self) -> "Split":
        if self.test + self.val >= 0.9:
            raise ValueError("test + val leave less than a tenth for training")
        return self


class Validate(Section):
    min_per_class: Positive = 8
    min_std: float = Field(2.0, ge=0)
    max_blank_share: Share = 0.01
    max_nodata_share: Share = 0.5
    max_saturated_share: Share = 0.5
    max_cloud_share: Share = 0.8
    max_imbalance: float = Field(10, ge=1)
    min_tiles_per_class: Positive = 8
    height_range: tuple[FiniteFloat, FiniteFloat] = (-500, 9000)
    retired_classes: list[str] = []
    max_share_change: Share = 0.1
    max_band_shift: float = Field(0.5, gt=0)
    pictures: Positive = 24
    soft: list[str] = [
        *("saturated", "cloud", "balance", "mask_tiles", "box_tiles", "boxes_inside"),
        *("class_shares", "band_means"),
    ]

    @model_validator(mode="after")
    def _a_range(self) -> "Validate":
        if not self.height_range[0] < self.height_range[1]:
            raise ValueError(f"height_range is [lowest, highest], found {list(self.height_range)}")
        return self


class Select(Section):
    """beside: further sensors that a task's model reads with `sensor`, of the very same ground."""

    sensor: str = "rgb"
    beside: list[str] = []
    labels_per_class: Positive | None = None

    @model_validator(mode="after")
    def _others(self) -> "Select":
        if len({self.sensor, *self.beside}) <= len(self.beside):
            raise ValueError("beside: sensors other than `sensor`, each once")
        return self


class Model(Section):
    """The encoder's architecture, in timm's words.

    Swin has a depth and a number of heads for each stage, a ViT one of each, no windows, and
    positions: `relative` as BEiT (a table that all blocks share in pre-training, one a block in
    fine-tuning) or `sincos`, fixed sine-cosine, as MAE.
    """

    backbone: Literal["swin", "vit"] = "swin"
    stem: Literal["pi_conv", "patch"] = "pi_conv"
    position: Literal["relative", "sincos"] = "relative"
    image_size: int = Field(64, ge=16, le=MAX_SIDE)
    patch_size: Literal[4, 8, 16] = 4
    embed_dim: int = Field(48, ge=8)
    depths: list[Positive] = Field(min_length=1, max_length=4)
    num_heads: list[Positive] = Field(min_length=1, max_length=4)
    window_size: Positive | None = 4

    @model_validator(mode="before")
    @classmethod
    def _windows(cls, values: Any) -> Any:
        # One architecture has one description, whatever a recipe before it left in params.yaml.
        if isinstance(values, dict) and values.get("backbone") == "vit":
            return {**values, "window_size": None}
        return values

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.backbone == "vit" and (len(self.depths), len(self.num_heads)) != (1, 1):
            raise ValueError("depths and num_heads have one value for a vit: [12], [12]")
        if self.backbone == "swin" and self.window_size is None:
            raise ValueError("window_size: swin needs one")
        if self.backbone == "swin" and self.position != "relative":
            raise ValueError(f"position: swin's is relative, {self.position} needs backbone: vit")
        if len(self.depths) != len(self.num_heads):
            raise ValueError("depths and num_heads need one value for each Swin stage")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size must be a multiple of {self.stride}, the encoder's stride"
            )
        if self.embed_dim % 4:
            raise ValueError("embed_dim must be a multiple of 4, for the stem")
        for i, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**i % heads:
                raise ValueError(f"{heads} heads do not divide {self.embed_dim * 2**i} channels")
        return self

    @property
    def stride(self) -> int:
        """Pixels a feature stands for: the patch, and for each further Swin stage twice as many."""
        return self.patch_size << (len(self.depths) - 1)


class Training(Section):
    """What every training has. Rates are for 512 images and scale with the batch."""

    epochs: Positive
    warmup_epochs: int = Field(ge=0)
    batch_size: Positive
    accumulate: Positive = 1
    base_lr: float = Field(gt=0)
    min_lr: float = Field(ge=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float = Field(5.0, gt=0)
    crop_scale: CropScale
    drop_path: float = Field(0.0, ge=0, lt=1)
    checkpoint_every_s: float = Field(20, ge=0)
    seed: int = 42

    @model_validator(mode="after")
    def _ordered(self) -> "Training":
        if self.warmup_epochs >= self.epochs:
            raise ValueError("warmup_epochs must be fewer than epochs")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError("crop_scale is [smallest, largest]")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: {self.accumulate} micro-batches do not divide batch_size "
                f"({self.batch_size})"
            )
        return self


class Pretrain(Training):
    refresh: Literal["full", "keep", "continue", "champion"] = "full"
    method: Literal["ringmo", "simmim", "mae"] = "ringmo"
    init: str | None = None
    mix: dict[str, Annotated[float, Field(gt=0)]] = Field({"rgb": 1.0}, min_length=1)
    mask_patch_size: Positive = 32
    mask_ratio: Ratio = 0.6
    inside_ratio: Ratio = 0.6
    lbp: bool = False
    picture_every: Positive = 5
    knn_every: Positive = 5

    @model_validator(mode="after")
    def _one_start(self) -> "Pretrain":
        if self.init and self.refresh == "continue":
            raise ValueError("init: with refresh: continue training starts from the champion")
        return self


class Finetune(Training):
    """Of one task. What only some tasks have is refused elsewhere: see `Config`."""

    image_size: Annotated[int, Field(ge=16, le=MAX_SIDE)] | None = None
    window_size: Positive | None = None
    freeze: bool = False
    early_stop: Positive | None = None
    layer_decay: Ratio = 1.0
    class_weights: Literal["none", "balanced"] = "none"
    heights: Literal["absolute", "above_lowest"] = "absolute"
    multi_label: bool = False
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    random_erasing: Share = 0.0
    rand_augment: float = Field(0.0, ge=0, le=10)
    test_resize: Positive | None = None

    def sized(self, model: Model) -> Model:
        """An encoder's architecture at the sizes of fine-tuning.

        Raises:
            ValueError: they do not fit the architecture.
        """
        sizes = {"image_size": self.image_size, "window_size": self.window_size}
        changed = {name: size for name, size in sizes.items() if size is not None}
        try:
            return Model.model_validate({**model.model_dump(), **changed})
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"finetune: {changed}: {said}") from None


class Hardware(Section):
    """What a machine has and how it is used; results do not depend on it but for rounding."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Literal["auto"] | Positive = "auto"
    precision: Literal["auto", 32, "bf16"] = "auto"
    compile: bool = False

    @model_validator(mode="after")
    def _computes(self) -> "Hardware":
        if self.accelerator == "cpu" and self.precision == "bf16":
            raise ValueError("precision: a CPU computes in 32 bits here: set auto or 32")
        return self


class Evaluate(Section):
    flips: Literal[1, 2, 4, 8] = 1
    histogram_baseline: bool = True
    bootstrap_samples: int = Field(1000, ge=100)
    worst: Positive = 24


class Compare(Section):
    """`ringmo compare`: the first of `initialisations` is compared with all others.

    They are methods of pre-training, `scratch`, `imagenet` (timm's weights), a registered encoder
    (encoder/3, encoder@champion) or the folder of an encoder's bundle.
    """

    tasks: list[str] | None = None
    initialisations: list[str] = Field(default=["ringmo", "simmim", "scratch"], min_length=1)
    labels: dict[str, Annotated[list[Positive], Field(min_length=1)]] = {}
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[1, 2, 3], min_length=1)
    finetune_steps: Positive = 1000
    scratch_equal_total: bool = True

    @field_validator("tasks", "initialisations", "seeds")
    @classmethod
    def _once_each(cls, values: list[Any] | None) -> list[Any] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("each may stand here once")
        return values

    @field_validator("labels")
    @classmethod
    def _counts_once(cls, labels: dict[str, list[int]]) -> dict[str, list[int]]:
        for task, counts in labels.items():
            if len(set(counts)) < len(counts):
                raise ValueError(f"{task}: each may stand here once")
        return labels

    @field_validator("initialisations")
    @classmethod
    def _named(cls, values: list[str]) -> list[str]:
        known = ("ringmo", "simmim", "mae", "imagenet", "scratch")
        for value in values:
            # A version or a folder has one of these in its name.
            if value not in known and not set(value) & set("/@."):
                near = difflib.get_close_matches(value, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}"
                raise ValueError(
                    f"`{value}` is no way to begin; {hint}, and encoder/NUMBER or a bundle's folder"
                )
        return values


class Gate(Section):
    """metric: a figure of the task's; null: its main one. max_drop, max_turn_drop: in the unit of
    that and of the main one. Of the others null: no such rule. Of `encoder`, which is judged by
    probes, max_drop alone."""

    metric: str | None = None
    max_drop: float = Field(0.03, ge=0)
    min_value: float | None = None
    max_value: float | None = None
    max_turn_drop: float | None = Field(None, ge=0)
    max_latency_ms: float | None = Field(None, gt=0)
    max_size_mb: float | None = Field(None, gt=0)
    max_data_age_days: float | None = Field(None, gt=0)


def _address(address: str | None) -> str | None:
    if address is not None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`{address}` is no address (http://… or https://…)")
        if parts.username or parts.password:
            raise ValueError("no password in params.yaml: the secret that signs is enough")
    return address


class Promotion(Section):
    """approval: who has the last word on what the gate has passed. wait_h: for a person's."""

    approval: Literal["auto", "person"] = "auto"
    wait_h: Annotated[float, Field(gt=0)] = 72
    webhook: str | None = None

    _http = field_validator("webhook")(_address)


class Card(Section):
    """What a model's card says and nothing else knows.

    price_per_hour: of the machine that trains, in `currency`. grams_co2_per_kwh: of its
    electricity.
    """

    intended_use: str | None = None
    limits: str | None = None
    owner: str | None = None
    contact: str | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    currency: str = "EUR"
    grams_co2_per_kwh: Annotated[float, Field(ge=0)] | None = None


class Monitoring(Section):
    """share: of the tiles that are answered. quiet_days: after a drift was told, it is not told
    again."""

    share: Share = 0.1
    pixels: bool = False
    keep_days: Positive = 30
    days: Positive = 7
    quiet_days: Annotated[float, Field(ge=0)] = 7
    cron: str | None = None
    retrain: bool = False


class Clean(Section):
    """What `ringmo clean` leaves: see `ringmo.cleaning`."""

    keep_runs: Positive = 5
    keep_days: Annotated[float, Field(ge=0)] = 14


class Run(Section):
    side_by_side: Positive = 1
    retries: int = Field(2, ge=0)
    retry_delay_s: float = Field(10, ge=0)
    stage_time_limit_min: float = Field(720, gt=0)
    grace_s: float = Field(30, ge=0)


class Schedule(Section):
    """Crons, and what becomes of runs that meet or were missed."""

    check: str | None = None
    retrain: str | None = None
    pretrain: str | None = None
    uploads: str | None = None
    cool_down_min: Annotated[float, Field(ge=0)] = 60
    overlap: Literal["queue", "skip", "replace"] = "queue"
    missed: Literal["once", "skip"] = "once"
    timezone: str = "UTC"


class Scenes(Section):
    """sources: as `ringmo predict` takes them. model: a task's alias, as segmentation@champion."""

    sources: list[str] = []
    model: str = "segmentation@champion"
    out: str = "answers"
    cron: str | None = None

    @field_validator("model")
    @classmethod
    def _alias(cls, ref: str) -> str:
        from ringmo import tasks

        task, at, alias = ref.partition("@")
        if task not in tasks.names() or not at or alias != "champion":
            raise ValueError(
                f"`{ref}` is no task's champion (TASK@champion; tasks: {', '.join(tasks.names())})"
            )
        return ref


class Notify(Section):
    """about: what is told. The servers' addresses with their passwords are in the environment."""

    about: list[Literal["failure", "refused", "approval"]] = ["failure", "refused", "approval"]
    mail: list[str] = []
    sender: str = "ringmo@localhost"
    slack: bool = False
    webhook: str | None = None

    _http = field_validator("webhook")(_address)

    @field_validator("mail", "sender")
    @classmethod
    def _mail(cls, given: Any) -> Any:
        for address in given if isinstance(given, list) else [given]:
            name, at, host = address.partition("@")
            if not (name and at and host) or set(address) & set(" \r\n,;<>"):
                raise ValueError(f"`{address}` is no mail address (name@host)")
        return given


class Versioning(Section):
    remote: str = ".ringmo/remote"
    endpoint: str | None = None


class Services(Section):
    mlflow_port: int = Field(5000, ge=1, le=65535)
    prefect_port: int = Field(4200, ge=1, le=65535)


class Config(Section):
    """The whole of params.yaml. Field docs live there, beside the values."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(alias="schema")
    tasks: list[str] = Field(min_length=1)
    ingest: Ingest
    sensors: dict[str, Sensor]
    split: Split
    validate_: Validate = Field(alias="validate")
    select: Select
    model: Model
    pretrain: Pretrain
    finetune: dict[str, Finetune]
    hardware: Hardware = Hardware()
    evaluate: Evaluate
    compare: Compare = Compare()
    gate: dict[str, Gate]
    promotion: Promotion = Promotion()
    card: Card = Card()
    monitoring: Monitoring = Monitoring()
    clean: Clean = Clean()
    run: Run
    schedule: Schedule
    scenes: Scenes = Scenes()
    notify: Notify = Notify()
    versioning: Versioning
    services: Services

    @field_validator("tasks", "finetune", "gate")
    @classmethod
    def _tasks_there_are(cls, given: Any, info: ValidationInfo) -> Any:
        from ringmo import tasks

        for name in given:
            if name == "encoder" and info.field_name == "gate":
                continue
            if name not in tasks.names():
                raise ValueError(tasks.unknown(name))
        if isinstance(given, list) and len(set(given)) < len(given):
            raise ValueError("each may stand here once")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for source, about in self.ingest.about.items():
            if about.sensor is not None and about.sensor not in self.sensors:
                raise ValueError(
                    f"ingest.about: {source}: `{about.sensor}` is not among sensors "
                    f"({', '.join(self.sensors)})"
                )
        for name in (self.select.sensor, *self.select.beside):
            if name not in self.sensors:
                raise ValueError(
                    f"select: `{name}` is not among sensors ({', '.join(self.sensors)})"
                )
        for name in self.pretrain.mix:
            if name not in self.sensors:
                raise ValueError(
                    f"pretrain.mix: `{name}` is not among sensors ({', '.join(self.sensors)})"
                )
        for name in (self.select.sensor, *self.select.beside):
            if name not in self.pretrain.mix:
                where = "sensor" if name == self.select.sensor else "beside"
                raise ValueError(
                    f"pretrain.mix: the tasks' sensor `{name}` (select.{where}) is missing: give "
                    f"it a share"
                )
        for task in self.tasks:
            if task not in self.finetune or task not in self.gate:
                raise ValueError(f"tasks: `{task}` needs a section in finetune and in gate")
        if "encoder" in self.gate:
            rule = self.gate["encoder"]
            for name in sorted(Gate.model_fields.keys() - {"max_drop"}):
                if getattr(rule, name) == Gate.model_fields[name].default:
                    continue
                raise ValueError(
                    f"gate.encoder.{name}: an encoder is judged by probes, for which max_drop "
                    f"alone counts: leave it out"
                )
        for task in self.compare.tasks or []:
            if task not in self.tasks:
                raise ValueError(
                    f"compare.tasks: `{task}` is not among tasks ({', '.join(self.tasks)})"
                )
        for task in self.compare.labels:
            if task not in self.finetune:
                raise ValueError(f"compare.labels: `{task}` has no section in finetune")
        for task, settings in self.finetune.items():
            self._check_task(task, settings)
        method = self.pretrain.method
        if method == "mae" and (self.model.backbone, self.model.position) != ("vit", "sincos"):
            raise ValueError(
                "pretrain.method: mae drops tokens, which needs model.backbone: vit with "
                "model.position: sincos"
            )
        if self.pretrain.init is not None and self.model.stem != "patch":
            raise ValueError("pretrain.init: weights of timm need its stem: model.stem: patch")
        if method != "mae" and self.model.image_size % self.pretrain.mask_patch_size:
            raise ValueError(
                f"pretrain.mask_patch_size: {self.pretrain.mask_patch_size} does not divide "
                f"model.image_size ({self.model.image_size})"
            )
        return self

    def _check_task(self, task: str, settings: Finetune) -> None:
        where = f"finetune.{task}"
        if task in self.tasks:
            size = settings.sized(self.model).image_size
            if settings.test_resize is not None and settings.test_resize < size:
                raise ValueError(
                    f"{where}.test_resize: {settings.test_resize} is less than the {size} pixels "
                    f"that the model reads of it"
                )
        sensor = self.sensors[self.select.sensor]
        if settings.rand_augment and (len(sensor.bands), sensor.dtype) != (3, "uint8"):
            raise ValueError(
                f"{where}.rand_augment: is for 8-bit colours, `{self.select.sensor}` "
                f"has {len(sensor.bands)} bands of {sensor.dtype}: set 0"
            )
        # Mixed or covered images have no true mask and no true boxes.
        only = {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, "rand_augment": 0.0}
        only |= {"multi_label": False}
        for name, off in only.items():
            if task != "scene" and getattr(settings, name) != off:
                raise ValueError(f"{where}.{name}: is for scene alone: leave it out")
        if task != "height" and settings.heights != "absolute":
            raise ValueError(f"{where}.heights: is for height alone: leave it out")
        mixes = settings.mixup or settings.cutmix or settings.random_erasing
        if self.select.beside and (mixes or settings.rand_augment):
            raise ValueError(
                f"{where}: mixup, cutmix, random_erasing and rand_augment are for one sensor: set "
                f"them to 0, or select.beside to []"
            )
        if settings.multi_label and (settings.mixup or settings.cutmix):
            raise ValueError(f"{where}.multi_label: goes without mixup and cutmix: set them to 0")

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read and check params.yaml.

        Raises:
            BadInput: one line naming the file, the key, and for a misspelt key the nearest one.
        """
        return cls.check(read_yaml(path), str(path))

    @classmethod
    def check(cls, values: Any, where: str) -> "Config":
        if not isinstance(values, dict):
            raise BadInput(f"{where}: expected sections with values, found {values!r}")
        if (key := _with_password(values)) is not None:
            # Every model's lineage keeps this file.
            raise BadInput(
                f"{where}: {key}: no password in params.yaml: it belongs in the environment"
            )
        if values.get("schema") != SCHEMA:
            raise BadInput(
                f"{where}: schema: this version reads {SCHEMA}, found {values.get('schema')!r}"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise BadInput(f"{where}: {_first_line(error)}") from None


def _with_password(values: Any) -> str | None:
    """The key of an address that has a user or a password in it, names of sources included."""
    for key, value in flatten(values).items():
        if shown(key) != key:
            return shown(key)
        if shown(text := str(value)) != text:
            return key
    return None


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        names = _sibling_names(first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(names)}"
        return f"{key}: no such key; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    found = "" if isinstance(given, dict) or first["type"] == "missing" else f", found {given!r}"
    return f"{key}: {message}{found}{more}" if key else f"{message}{more}"


def _sibling_names(loc: tuple[int | str, ...]) -> list[str]:
    """Keys that would have been right where `loc` is wrong."""
    model: Any = Config
    for part in loc[:-1]:
        by_name = {f.alias or n: f for n, f in model.model_fields.items()} if model else {}
        if part in by_name:
            annotation = by_name[str(part)].annotation
            values = getattr(annotation, "__args__", ())
            model = values[-1] if values and isinstance(values[-1], type) else annotation
    fields = getattr(model, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]


def read_yaml(path: Path) -> Any:
    """A YAML file as plain values, by DVC's reader: what that refuses, no chain could run with.

    Raises:
        BadInput: missing, or not YAML (with the line).
    """
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return _plain(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        # A bare s3://… in a list, in most cases.
        todo = ': put quotes around what has a colon, as "s3://BUCKET/PREFIX"'
        more = todo if "unexpected ':'" in str(error.problem) else ""
        raise BadInput(f"{path}, line {line}: not YAML: {error.problem}{more}") from None
    except YAMLError as error:  # bytes that are no text, or nested without end
        raise BadInput(f"{path}: not YAML: {str(error).splitlines()[0]}") from None


def _plain(text: bytes | str, pure: bool = False) -> Any:
    """YAML as plain values: the safe reader makes YAML's own types and knows no tags of Python's.

    Args:
        pure: by the reader that takes a bare s3://… in a list, and five times as long.

    Raises:
        YAMLError: not YAML, or nested over MAX_DEPTH times.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    safe, depth = YAML(typ="safe", pure=pure), 0
    for event in safe.parse(text):  # which, unlike the loading, does not go deeper itself
        depth += type(event).__name__.endswith("StartEvent")
        depth -= type(event).__name__.endswith("EndEvent")
        if depth > MAX_DEPTH:
            raise YAMLError(f"nested over {MAX_DEPTH} times")
    return safe.load(text)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Of these the keys are the user's own: who names some means no others.
WHOLE = ("ingest.about", "ingest.mask_codings", "pretrain.mix")


def recipe(path: Path) -> dict[str, Any]:
    """A recipe's values by dotted key, as `edit` takes them; those of its `base` come first.

    Raises:
        BadInput: missing, or not YAML (with the line).
    """
    values = read_yaml(path) or {}
    base = values.pop("base", None)
    changes = recipe(path.with_name(f"{base}.yaml")) if base else {}
    for key in WHOLE:
        section, name = key.split(".")
        if name in values.get(section, {}):
            changes[key] = values[section].pop(name)
    return changes | flatten(values)


def edited(path: Path, changes: dict[str, Any]) -> Config:
    """The configuration that `edit` would leave, without writing it."""
    return _edited(path, changes)[0]


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Write values at dotted keys of params.yaml, keeping its comments; nothing if one is wrong.

    Raises:
        BadInput: an unknown key or a value out of range; the file is left as it was.
    """
    _, text = _edited(path, changes)
    if text != path.read_text():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text)
        temporary.replace(path)


def _edited(path: Path, changes: dict[str, Any]) -> tuple[Config, str]:
    from io import StringIO

    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedSeq

    read_yaml(path)  # one line for what is not YAML
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    # DVC's reader takes a bare s3://… in a list for an error.
    yaml.representer.add_representer(
        str,
        lambda self, text: self.represent_scalar(
            "tag:yaml.org,2002:str", text, style='"' if ":" in text else None
        ),
    )
    document = yaml.load(path)
    for key, value in changes.items():
        place = document
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                raise BadInput(f"{path}: {key}: no such section `{parent}`")
            place = place[parent]
        if isinstance(value, list):
            value = CommentedSeq(value)
            value.fa.set_flow_style()
        place[last] = value
    stream = StringIO()
    yaml.dump(document, stream)
    text = stream.getvalue()
    return Config.check(_plain(text), str(path)), text


def parse_assignment(text: str) -> tuple[str, Any]:
    """`pretrain.epochs=40` as key and value, the value read as YAML."""
    from ruamel.yaml.error import YAMLError

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {text}: expected key=value")
    try:
        return key, _plain(value, pure=True)
    except YAMLError:
        raise BadInput(f"--set {text}: the value is not YAML") from None


def digest(*values: Any) -> str:
    """A stable hash of plain values and models: a training's fingerprint, a parameters' digest."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else value

    text = json.dumps([plain(value) for value in values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
