"""`plan --detail STAGE`: every figure of a training stage with its formula, so that it can be checked by hand."""

from hpc.config import Machine, RunConfig, Trains
from hpc.errors import ConfigError
from hpc.plan.calibration import Measured
from hpc.plan.facts import all_facts, compute_precision
from hpc.plan.flops import attention_flops_per_token, forward_flops_per_token
from hpc.plan.imbalance import Imbalance
from hpc.plan.memory import Memory, training_memory
from hpc.plan.plan import Plan, StagePlan
from hpc.plan.quantity import GIB, amount
from hpc.plan.show import duration
from hpc.plan.work import flops_per_token

MIB = 2**20


def render_detail(config: RunConfig, plan: Plan, machine: Machine, measured: Measured, name: str) -> str:
    """What --detail prints. Raises ConfigError when no stage of that name trains a model whose size is known."""
    planned = next((stage for stage in plan.stages if stage.name == name), None)
    if planned is None or planned.memory is None:
        trains = [stage.name for stage in plan.stages if stage.memory is not None]
        raise ConfigError(f"--detail {name}: no such training stage; there are {', '.join(trains) or 'none'}")
    lines = [f"stage {name}", "", *_symbols(config, planned), "", *_memory(config, planned, machine), ""]
    lines += [*_time(planned, measured), "", *_checkpoints(planned, machine)]
    return "\n".join(lines)


def _symbols(config: RunConfig, planned: StagePlan) -> list[str]:
    stage, facts = config.stage(planned.name), all_facts(config)[planned.name]
    assert isinstance(stage, Trains)
    assert facts is not None
    settings, parameters, model = stage.train, facts.parameters, facts.model
    ranks, group = settings.parallel.world_size, settings.parallel.expert_parallel_size
    trained = planned.trainable_params or 0
    per_token = flops_per_token(facts, settings)
    forward = forward_flops_per_token(model, facts.router, facts.vocab_size, settings.batches.seq_len)
    rows = [
        ("parameters", f"{parameters.total:,} = embedding {parameters.embedding:,} + head {parameters.head:,} + "
         f"attention {parameters.attention:,} + routers {parameters.router:,} + experts {parameters.experts:,} + "
         f"shared and dense {parameters.always:,} + norms {parameters.norms:,}"),
        ("active", f"{parameters.active:,}: {facts.router.top_k} of {facts.router.num_experts} experts"),
        ("N", f"{parameters.dense + parameters.experts / group:,.0f} = dense {parameters.dense:,} + "
         f"experts / EP {group}: on one rank"),
        ("n", f"{trained / ranks:,.0f} = trained {trained:,} / {ranks} ranks"),
        ("b", f"{4 if planned.precision == 'fp32' else 2} bytes ({planned.precision})"),
        ("tokens", f"{settings.batches.micro_batch_size} x {settings.batches.seq_len} in a micro-batch, "
         f"{settings.gradient_accumulation_steps} of them on each rank make a step of "
         f"{settings.batches.tokens_per_step:,}"),
        ("FLOPs", f"{per_token:,.0f} per token; forward {forward:,.0f} = 2 x active matrices "
         f"{parameters.active_matrices:,} + attention's scores (with its matrices "
         f"{attention_flops_per_token(model, settings.batches.seq_len):,.0f}); PaLM, arXiv:2204.02311, appendix B"),
    ]  # fmt: skip
    return [f"  {symbol:<11} {text}" for symbol, text in rows]


def _memory(config: RunConfig, planned: StagePlan, machine: Machine) -> list[str]:
    memory = planned.memory
    assert memory is not None
    lines = [f"memory of a rank: {memory.bytes / GIB:.2f} GiB of {machine.memory_gib_per_rank:g}; MiB, formula"]
    lines += [f"  {part.name:<30} {part.bytes / MIB:>10,.1f}  {part.formula}"
              for part in (memory.process, *memory.heap, *memory.states)]  # fmt: skip
    lines += ["  and the largest of:"]
    for part in memory.passes:
        mark = "*" if part is memory.fullest else " "
        lines.append(f"  {mark} {part.name:<28} {part.bytes / MIB:>10,.1f}  {part.formula}")
    if memory.slack != 1.0:
        lines.append(f"  all but the process x {memory.slack:g}: a heap that is kept has holes (measured)")
    lines += [f"  on the host: {part.name:<17} {part.bytes / MIB:>10,.1f}  {part.formula}" for part in memory.host]
    return [*lines, *_loads(config, planned, machine, memory)]


def _loads(config: RunConfig, planned: StagePlan, machine: Machine, memory: Memory) -> list[str]:
    """The same stage at the mean and the worst load of its experts."""
    stage, facts, load = config.stage(planned.name), all_facts(config)[planned.name], memory.load
    if load.worst == 1.0 or facts is None or not isinstance(stage, Trains):
        return [f"  experts' load: even ({load.how})"]
    words = []
    for name, value in (("mean", load.mean), ("p99", load.p99), ("worst", load.worst)):
        at = training_memory(
            facts, stage.train, compute_precision(machine, stage.train), on_cpu=machine.device != "cuda",
            load=Imbalance(1.0, value, load.worst, load.how),
        )  # fmt: skip
        words.append(f"{name} x {value:.2f}: {at.bytes / GIB:.2f} GiB")
    return [f"  tokens of the fullest rank's experts, over an even share: {', '.join(words)} ({load.how})"]


def _time(planned: StagePlan, measured: Measured) -> list[str]:
    step = planned.step
    assert step is not None
    rate = measured.rate(planned.name, planned.kind)
    lines = [f"time: {duration(planned.time.value)}; {planned.time.how}"]
    if rate:
        lines.append(f"  rate: {rate.how}")
    lines += [f"  {part:<30} {1e3 * value:>10,.2f} ms of a step" for part, value in step.parts.items() if value]
    lines.append(f"  {'step':<30} {1e3 * step.seconds:>10,.2f} ms, {amount(planned.steps)} of them")
    if "exchange" not in step.parts and planned.nodes * planned.ranks_per_node > 1 and "compute" in step.parts:
        lines.append("  exchange between ranks is not counted: the site states no bandwidth for it")
    return lines


def _checkpoints(planned: StagePlan, machine: Machine) -> list[str]:
    saved, time, found = planned.checkpoint, planned.checkpoint_time, planned.failures
    lines = [f"checkpoint: {amount(saved.value)}B, {saved.how}; {duration(time.value)} to write, {time.how}"]
    if found is None:
        return [*lines, "failures: unknown: the site does not state node_mtbf_hours"]
    return [
        *lines,
        f"failures: {found.expected:.3g} expected ({machine.node_mtbf_hours:g} h between those of a node)",
        f"  checkpoints every {duration(found.interval_s)}, best {duration(found.best_interval_s)} (Daly 2006, "
        f"doi:10.1016/j.future.2004.11.016); goodput {found.goodput:.2%}, at best {found.best_goodput:.2%}",
    ]
