"""A plan in words and tables, for tools/plan.py."""

from megacm3.parallel.dryrun import DryRun
from megacm3.planning.counts import flops_per_token, forward_flops, parameters, sequence_flops
from megacm3.planning.layout import bubble
from megacm3.planning.plan import EFFICIENCY, GB, USABLE, Gpu, Plan, describe
from megacm3.planning.traffic import tensor_traffic


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _size(count: float) -> str:
    return f"{count / GB:.2f}"


def model_lines(plan: Plan) -> list[str]:
    """Parameters and FLOPs."""
    model = plan.config.model
    forward = forward_flops(model)
    share = forward.attention / (forward.blocks + forward.head)
    return [
        f"{model.preset or 'model'}: {parameters(model):,} parameters",
        f"FLOPs a token, forward and backward: {flops_per_token(model):.4g} (attention {share:.0%}; every position "
        "against every other, as torch's counter has it)",
    ]


def layout_lines(plan: Plan) -> list[str]:
    """How the ranks are cut."""
    layout = plan.layout
    again = sequence_flops(plan.config.model, layout.recompute) / sequence_flops(plan.config.model) - 1
    choice = plan.config.train.parameters
    frozen = (
        [] if choice == "all" else [f"train.parameters = {choice}: less trains than is counted here; an upper bound"]
    )
    return [
        *frozen,
        f"{layout.world} ranks: tensor {layout.tensor}{' with sequence parallel' if layout.sequence else ''}, data "
        f"{layout.data}, pipeline {layout.pipeline}, ZeRO {layout.zero}, recompute {layout.recompute} "
        f"(+{again:.0%} FLOPs)",
        f"a step: {layout.micro_batches} micro-batches of {layout.micro_batch} on each data rank; pipeline bubble "
        f"{bubble(layout):.1%}",
    ]


def memory_lines(plan: Plan, kind: Gpu | None) -> list[str]:
    """GiB of one rank of each stage, equal stages once."""
    rows = [["stage", "parameters", "weights", "gradients", "optimizer", "activations", "buffers", "total GiB", "host"]]
    previous: list[str] = []
    for stage in plan.stages:
        m = stage.memory
        parts = (m.parameters, m.gradients, m.optimizer, m.activations, m.buffers, m.total, m.host)
        row = [f"{stage.parameters:,}", *(_size(part) for part in parts)]
        if row != previous:
            rows.append([str(stage.stage), *row])
        previous = row
    lines = ["a rank's memory, GiB (stages like the one above are left out):", *_table(rows)]
    if kind:
        verdict = "fits" if plan.fits(kind) else "does NOT fit"
        lines.append(
            f"  {verdict} {kind.name}: {_size(plan.worst.memory.total)} of {_size(USABLE * kind.memory)} GiB "
            f"({USABLE:.0%} of the GPU's memory)"
        )
    return lines


def traffic_lines(plan: Plan) -> list[str]:
    """Communication of a step on the rank that needs most memory."""
    rows = [["axis", "operation", "calls", "GiB", "GiB sent"]]
    for item in plan.worst.traffic:
        rows.append([item.axis, item.operation, f"{item.count:,}", _size(item.bytes), _size(item.sent)])
    if len(rows) == 1:
        return ["communication: none"]
    where = f"a rank of stage {plan.worst.stage}"
    return [f"communication of a step on {where} (data: calls before bucketing):", *_table(rows)]


def time_lines(plan: Plan, kind: Gpu) -> list[str]:
    """The derived step time."""
    seconds = plan.step_seconds(kind)
    tokens = plan.config.train.global_batch * plan.config.model.sequence_length
    used = tokens * flops_per_token(plan.config.model) / seconds / plan.layout.world / kind.peak
    return [
        f"derived, not measured (products at {EFFICIENCY:.0%} of {kind.peak / 1e12:.0f} TFLOP/s): a step of {tokens:,} "
        f"tokens in {seconds:.1f} s, {tokens / seconds / plan.layout.world:,.0f} tokens/s a GPU, {used:.0%} of the peak"
    ]


def suggestion_lines(plans: list[Plan], kind: Gpu) -> list[str]:
    """The layouts that fit, best first."""
    lines = [f"suggested for {plans[0].layout.world} x {kind.name}, by derived step time:"]
    for plan in plans:
        lines.append(
            f"  {plan.step_seconds(kind):8.1f} s a step, {_size(plan.worst.memory.total)} GiB: {describe(plan)}"
        )
    return lines


def dry_run_lines(plan: Plan, found: DryRun) -> list[str]:
    """What every rank really builds, and the collectives that it really starts, against the estimate."""
    layout, config = plan.layout, plan.config
    rows = [["stage", "parameters", "FLOPs", *_OPERATIONS, "as estimated"]]
    for report in found.reports:
        if report.tensor_rank == 0:
            traffic = tensor_traffic(config, layout, report.stage)
            expected = {item.operation: item.count // layout.micro_batches for item in traffic}
            same = expected == report.count and report.parameters == plan.stages[report.stage].parameters
            row = [str(report.stage), f"{report.parameters:,}", f"{report.flops:.4g}"]
            row += [str(report.count.get(name, 0)) for name in _OPERATIONS]
            rows.append([*row, "yes" if same else "NO"])
    return [
        f"dry run: {len(found.reports)} distinct ranks of {found.ranks} built on the meta device in "
        f"{found.seconds:.1f} s; together they hold {found.parameters:,} numbers, each tensor whole",
        "one micro-batch on the first rank of each stage:",
        *_table(rows),
    ]


_OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter")


def report(plan: Plan, kind: Gpu | None) -> str:
    """The whole text for one layout."""
    lines = [*model_lines(plan), *layout_lines(plan), *memory_lines(plan, kind), *traffic_lines(plan)]
    return "\n".join(lines + (time_lines(plan, kind) if kind else []))
