"""MegaBlocks' own code against plain torch, without a GPU; what that proves and what not is said in cpu_ops.py.

Triton's interpreter is a switch for the whole process, so these tests have a pytest of their own:
`python tests/megablocks/install.py FOLDER` installs what they need and prints the command.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from slurm.network import free_port
from tests.conftest import ROOT

HERE = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.megablocks,
    pytest.mark.skipif(
        not HERE, reason="has an environment of its own: python tests/megablocks/install.py FOLDER tells how"
    ),
]
if HERE:
    from deepspeed.moe.ep_experts import GroupedExperts

    from hpc.evaluate.loss import token_losses
    from hpc.model.build import build_model, model_config
    from hpc.model.experts import BACKENDS, swiglu_experts, use_backend
    from tests.megablocks import cpu_ops
    from tests.megablocks.layers import INNER, E, H, K, arguments, dmoe, to_megablocks
    from tests.megablocks.two_ranks import CASE, STEPS
    from tests.train.exactness import data, settings_for

ARCHITECTURES = ["mixtral", "olmoe", "qwen3_moe"]


def experts() -> tuple[Tensor, Tensor]:
    """gate_up (E, 2I, H) and down (E, H, I), as transformers has them."""
    generator = torch.Generator().manual_seed(2)
    gate_up = 0.2 * torch.randn(E, 2 * INNER, H, generator=generator)
    down = 0.2 * torch.randn(E, H, INNER, generator=generator)
    return gate_up.requires_grad_(), down.requires_grad_()


def plain(x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer as a formula: every expert on every token, weighted with what the router gave, mostly zero."""
    gate_TEI, up_TEI = torch.einsum("th,eih->tei", x_TH, gate_up).chunk(2, -1)
    y_TEH = torch.einsum("tei,ehi->teh", functional.silu(gate_TEI) * up_TEI, down)
    weights_TE = torch.zeros(x_TH.shape[0], gate_up.shape[0]).scatter(1, chosen_TK, weights_TK)
    return torch.einsum("te,teh->th", weights_TE, y_TEH)


def results(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """An output and the gradients of its inputs, for a loss that no symmetry makes small."""
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return [y.detach(), *torch.autograd.grad((y * slope).sum(), inputs)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=3e-6, rtol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_its_dropless_layer_and_our_backend_are_the_formula_forward_and_backward() -> None:
    gate_up, down = experts()
    layer, x = dmoe()
    x.requires_grad_()
    router = layer.router.layer.weight
    weights = {f"experts.{name}": weight for name, weight in to_megablocks(gate_up, down).items()}
    theirs = results(functional_call(layer, weights, (x,)), x, router, gate_up, down)

    def routed(layer: Callable[..., Tensor]) -> list[Tensor]:
        x_TH = x.flatten(0, 1)
        weights_TK, chosen_TK = torch.topk(torch.softmax(x_TH @ router.T, -1), K)
        y_TH = layer(x_TH, chosen_TK, weights_TK / weights_TK.sum(-1, keepdim=True), gate_up, down)
        return results(y_TH.view(x.shape), x, router, gate_up, down)

    formula = routed(plain)
    before = cpu_ops.calls
    ours = routed(partial(swiglu_experts, BACKENDS["megablocks"]))

    assert cpu_ops.calls - before == 6  # two products, each with two more for its gradients
    assert all(gradient.abs().max() > 0.1 for gradient in formula)
    assert same(theirs, formula)
    assert same(ours, formula)


def test_a_swapped_gate_and_up_is_caught() -> None:
    gate_up, down = experts()
    layer, x = dmoe()
    swapped = gate_up.detach().roll(INNER, 1)
    right, wrong = (
        functional_call(
            layer, {f"experts.{name}": weight for name, weight in to_megablocks(value, down.detach()).items()}, (x,)
        )
        for value in (gate_up.detach(), swapped)
    )
    assert (right - wrong).abs().max() > 0.1


def its_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """MegaBlocks' ParallelDroplessMLP as a forward of transformers' experts: Triton kernels instead of our dispatch."""
    from megablocks import ParallelDroplessMLP

    gate_up: Any = self.gate_up_proj
    num_experts, twice_inner, hidden = gate_up.shape
    layer = ParallelDroplessMLP(arguments(num_experts, top_k_index.shape[-1], hidden, twice_inner // 2))
    weights = to_megablocks(gate_up, self.down_proj)
    routed = (hidden_states, torch.empty(0), top_k_weights, top_k_index)
    result: Tensor = functional_call(layer, weights, routed)
    return result


def tiny(architecture: str) -> tuple[nn.Module, Tensor]:
    settings = settings_for(f"1/1/free/1/{architecture}/sgd/plain", 1)
    return build_model(model_config(settings.model, settings.router, 64, 64, 0), seed=3), data()[0, :2]


def logits_and_gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    token_losses(logits, ids[:, 1:]).mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_computes_the_same_with_our_backend_and_with_its_dropless_layer(architecture: str) -> None:
    model, ids = tiny(architecture)
    use_backend(model, "loop")
    wanted = logits_and_gradients(model, ids)
    before = cpu_ops.calls
    use_backend(model, "megablocks")
    assert same(logits_and_gradients(model, ids), wanted)
    layers = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    assert cpu_ops.calls - before == 6 * len(layers) > 0
    for module in layers:
        module.forward = MethodType(its_experts, module)
    assert same(logits_and_gradients(model, ids), wanted)


def local_experts(counts: Tensor, rows: int, backend: str) -> list[Tensor]:
    """Output of the counted rows and gradients of DeepSpeed's local experts, with NaN in what is only padding."""
    torch.manual_seed(0)
    layer = GroupedExperts(dim=H, hidden_dim=INNER, num_experts=4, use_grouped_mm=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    use_backend(nn.ModuleList([layer]), backend)
    counted = int(counts.sum())
    x = torch.randn(rows, H)
    x[counted:] = torch.nan
    y = layer(x.requires_grad_(), counts)
    assert y.shape == x.shape
    found = results(y[:counted], x, layer.w1, layer.w2, layer.w3)
    return [found[0], found[1][:counted], *found[2:]]


@pytest.mark.parametrize(("counts", "rows"), [([5, 0, 9, 2], 16), ([8, 8, 0, 8], 32), ([0, 0, 0, 0], 8), ([0] * 4, 0)])
def test_deepspeeds_local_experts_take_padding_rows_and_a_rank_without_tokens(counts: list[int], rows: int) -> None:
    for dtype in (torch.int32, torch.int64):  # AutoEP counts in int32 once it has aligned the groups
        held = torch.tensor(counts, dtype=dtype)
        assert same(local_experts(held, rows, "megablocks"), local_experts(held, rows, "loop"))


@pytest.mark.parametrize("wrong", ["counts in int32", "counts that end early", "weights in columns"])
def test_the_stand_in_refuses_what_the_cuda_kernel_refuses(wrong: str) -> None:
    from megablocks.grouped_gemm_util import ops

    x, weights, counts = torch.randn(6, 4), torch.randn(2, 3, 4), torch.tensor([2, 4])
    assert ops.gmm(x, weights, counts, trans_b=True).shape == (6, 3)
    if wrong == "counts in int32":
        counts = counts.int()
    elif wrong == "counts that end early":
        counts = torch.tensor([2, 3])
    else:
        weights = torch.randn(2, 4, 3).transpose(1, 2)
    with pytest.raises(AssertionError):
        ops.gmm(x, weights, counts, trans_b=True)


LOAD = """
import torch
from tests.megablocks import cpu_ops
cpu_ops.install()
from hpc.model.experts import BACKENDS
arguments = torch.randn(7, 4), torch.randn(3, 5, 4), torch.tensor([4, 0, 2])
y = [BACKENDS[name](*arguments)[:6] for name in ("megablocks", "loop")]
assert torch.allclose(*y, atol=1e-6)
assert cpu_ops.calls == 1
import kernels
print(*(kernel.metadata.id for kernel in kernels.get_loaded_kernels()))
"""


@pytest.mark.parametrize("asked", ["a" * 40, "b" * 40])
def test_the_hubs_build_is_taken_from_its_cache_offline_by_commit(tmp_path: Path, asked: str) -> None:
    snapshot = tmp_path / "kernels--kernels-community--megablocks" / "snapshots" / ("a" * 40)
    build = snapshot / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("from megablocks.grouped_gemm_util import ops as gg_ops\n")
    metadata = {"name": "megablocks", "id": "the_build_of_a", "version": 1, "license": "Apache-2.0"}
    (build / "metadata.json").write_text(json.dumps({**metadata, "python-depends": [], "backend": {"type": "cpu"}}))
    offline = {"HF_HUB_OFFLINE": "1", "KERNELS_CACHE": str(tmp_path), "GREENMOE_MEGABLOCKS_REVISION": asked}
    result = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **offline}
    )
    if asked == "a" * 40:
        assert result.stdout.strip() == "the_build_of_a", result.stderr
    else:
        told = result.stderr.strip().splitlines()[-1]
        assert "ConfigError: kernels-community/megablocks at GREENMOE_MEGABLOCKS_REVISION = bbb" in told
        assert "install_kernel" in told


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes computed together."""
    out = tmp_path_factory.mktemp("two") / "told.pt"
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.megablocks.two_ranks", str(out)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-2000:] for text in outputs)
    told: dict[str, Any] = torch.load(out)
    return told


def test_our_engine_trains_with_experts_on_two_ranks_as_plain_descent_on_one(two_ranks: dict[str, Any]) -> None:
    settings = settings_for(CASE, 2)
    model = build_model(model_config(settings.model, settings.router, 64, 64, 0), seed=0)
    use_backend(model, "loop")
    losses = []
    for batch in data()[:STEPS]:
        model.zero_grad()
        loss = token_losses(model(input_ids=batch[:, :-1], use_cache=False).logits, batch[:, 1:]).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= settings.optimizer.lr * parameter.grad
    told = two_ranks["engine"]
    assert told["calls"] == STEPS * 9 * settings.model.num_layers  # three products, AutoEP keeps gate and up apart
    assert losses[-1] < losses[0] - 0.01
    assert told["losses"] == pytest.approx(losses, abs=2e-6)
    for name, weight in model.state_dict().items():
        assert torch.allclose(told["weights"][name], weight, atol=2e-6), name


def test_its_own_expert_parallelism_halves_the_gradients_that_deepspeed_would_halve_again(
    two_ranks: dict[str, Any],
) -> None:
    layer, x = dmoe()
    y = layer(x)
    y.square().sum().backward()
    assert torch.allclose(two_ranks["dmoe"]["y"], y, atol=1e-6)
    assert torch.allclose(two_ranks["dmoe"]["v1"], layer.experts.mlp.v1.grad / 2, atol=1e-5)
