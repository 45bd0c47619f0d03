"""A plan as plain values (what `--json` prints and a page draws): nothing here is text for a terminal.

`training_plan`: model, the layouts that fit or the one that was asked for, memory, time, communication, formulas
beside exact counts, what the compute would best be spent on. `serving_plan`: weights, caches, users, tokens/s.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from hanlin.core.errors import HanlinError
from hanlin.parallel.settings import Layout
from hanlin.plan import formulas as f
from hanlin.plan.closed import Job, closed_memory, frozen_bytes, lora_numbers, micro_batches
from hanlin.plan.communication import by_axis
from hanlin.plan.devices import GIB, Cluster
from hanlin.plan.exact import Counted, count_exactly
from hanlin.plan.memory import Memory
from hanlin.plan.request import Request
from hanlin.plan.scaling import CHINCHILLA, REPLICATION, rule_of_twenty
from hanlin.plan.search import (
    RESERVE,
    Candidate,
    Found,
    check_layout,
    describe_layout,
    fastest,
    fullest,
    search,
    used_axes,
)
from hanlin.plan.seconds import Rates
from hanlin.plan.serving import BYTES, Service, weight_bytes
from hanlin.plan.step_time import Assumptions, step_time
from hanlin.plan.volumes import volumes

JsonValue = dict[str, Any]
SHOWN = 3  # layouts of a search
MOST_RUNS = 4  # layouts that are run on fake tensors until one fits: seconds each


def training_plan(
    request: Request, cluster: Cluster, *, layout: Layout | dict[str, Any] | None = None, tokens: float | None = None,
    price: float | None = None, reserve: float = RESERVE, assumed: Assumptions | None = None, fixed_rows: bool = False,
    recompute: f.Recompute | None = None,
    rates: Rates | None = None,
) -> JsonValue:  # fmt: skip
    """The plan of a training run. layout: this one, or fields that are laid over the request's (None: the request's,
    else all are searched); tokens: to train on in all (None: the request's steps, if it has them); price: of an hour of
    one device; fixed_rows: the search keeps the request's rows of a micro-batch, as it does where the request asks for
    them; recompute: it keeps this (None: the request's, else it tries both); rates: measured on this machine, for a
    single process."""
    assumed = assumed or Assumptions()
    wanted = merged_layout(request.layout, layout)
    room = cluster.device.memory - reserve
    count = partial(
        count_exactly, optimizer=request.optimizer, cuda=not cluster.device.name.startswith("CPU"), rates=rates
    )
    found: Found | None = None
    refused: list[Refused] = []
    counted: Counted | None = None
    if wanted is None:
        found = search(
            request.job, cluster, reserve=reserve, assumed=assumed, fixed_rows=fixed_rows or request.fixed_rows,
            recompute=recompute or request.recompute,
        )  # fmt: skip
        chosen, counted, refused = _that_run(found, room, count)
    else:
        chosen = [planned(request.job, wanted.fitted(cluster.world), cluster, assumed)]
    if chosen and counted is None:
        counted = count(chosen[0].job, chosen[0].layout)
    if tokens is None and request.steps is not None:
        tokens = float(request.steps * request.job.tokens)
    plan: JsonValue = {
        "kind": "training",
        "name": request.name,
        "model": _model(request.job),
        "machine": _machine(cluster, reserve),
        "step": _step(request.job),
        "layouts": [
            _layout(c, room, tokens, price) | (_counted(counted, room) if counted is not None and not i else {})
            for i, c in enumerate(chosen)
        ],
        "searched": None if found is None else _searched(found, refused),
        "tokens": tokens,
        "price_per_gpu_hour": price,
        "assumptions": assumed.__dict__,
        "notes": request.notes,
    }
    if counted is not None:
        plan["formulas"] = [_formula(row) for row in classic_table(chosen[0], counted.memory)]
    plan["compute_optimal"] = _compute_optimal(request.job, tokens)
    return plan


def merged_layout(asked: Layout | None, given: Layout | dict[str, Any] | None) -> Layout | None:
    """`given` fields over those that were asked for; a whole layout stands for itself."""
    if given is None or isinstance(given, Layout):
        return given or asked
    if not given:
        return asked
    fields = {} if asked is None else {name: getattr(asked, name) for name in asked.model_fields_set}
    try:
        return Layout.model_validate({**fields, **given})
    except ValidationError as error:
        first = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise HanlinError(f"This layout is not one: {first}.") from None


@dataclass(frozen=True)
class Refused:
    """A layout that fits by the closed form and not by the run; peak: bytes of the run."""

    candidate: Candidate
    peak: int


def _that_run(
    found: Found, room: float, count: Callable[[Job, Layout], Counted]
) -> tuple[list[Candidate], Counted | None, list[Refused]]:
    """The layouts to show, the first of which fits by the run too, its count, and what did not. Each refusal takes
    those of the same axes away that would need more than there is, were their closed form as wrong."""
    if not found.best:
        return ([found.nearest] if found.nearest else []), None, []
    left, refused = found.fitting, []
    for _ in range(MOST_RUNS):
        if not left:
            break
        first = fastest(left)[0]
        counted = count(first.job, first.layout)
        if counted.memory is None or counted.memory.peak <= room:
            return fastest(left)[:SHOWN], counted, refused
        refused.append(Refused(first, counted.memory.peak))
        limit, axes = room * first.bytes / counted.memory.peak, used_axes(first.layout)
        left = [c for c in left if c is not first and (used_axes(c.layout) != axes or c.bytes <= limit)]
    return fastest(left)[:SHOWN] or found.best, None, refused


def _searched(found: Found, refused: list[Refused]) -> JsonValue:
    """What the search tried, and why the others fail, those by the run among them."""
    failed = dict(found.failed)
    for r in refused:
        c = r.candidate
        name = f"{describe_layout(c.layout)}, {c.job.micro_batch} rows at once, recompute {c.job.recompute}"
        failed[f"out of memory when run: {name}: {r.peak / GIB:.1f} GiB, closed form {c.bytes / GIB:.1f}"] = 1
    return {"tried": found.tried, "failed": failed, "fits": bool(found.best)}


def planned(job: Job, layout: Layout, cluster: Cluster, assumed: Assumptions) -> Candidate:
    """One layout that was asked for, whether or not it fits; one that cannot run is a `HanlinError`."""
    check_layout(job, layout, cluster)
    return Candidate(layout, job, fullest(job, layout), step_time(job, layout, cluster, assumed))


def classic_table(candidate: Candidate, run: Memory | None = None) -> list[f.Formula]:
    """Every classic formula beside the exact count of the same thing. run: of this layout on fake tensors."""
    job, layout = candidate.job, candidate.layout
    config, sizes = job.config, job.sizes
    parameters = config.parameters()
    total, s, b = float(parameters.total), job.length, job.micro_batch
    exact_flops = 3.0 * sizes.flops(s).total * job.batch
    several = replace(job, batch=2 * job.batch)  # then all gradients are there at the fullest moment
    states = sum(fullest(several, layout)[name] for name in ("weights", "gradients", "optimiser"))
    replicas = (layout.data or 1) * layout.context
    full = replace(several, method="full", recompute="none")
    plain = closed_memory(full, Layout().fitted(1))
    a = config.layers[0].attention
    table = [
        f.Formula("parameters", "12 l h^2 + V h", "arXiv:2001.08361", "parameters", f.parameters_12lh2(config), total,
                  _why_parameters(job)),
        f.Formula("active parameters", "12 l h^2", "arXiv:2001.08361", "parameters",
                  f.parameters_12lh2(config, vocabulary=False), float(parameters.active), _why_parameters(job)),
        f.Formula("model states, whole", "16 Phi = (2 + 2 + 12) Phi, or (4 + 4 + 8) Phi", "arXiv:1910.02054", "bytes",
                  f.model_state_bytes(total), plain["weights"] + plain["gradients"] + plain["optimiser"],
                  "" if job.states == 8 else "the optimizer keeps other states than two fp32 moments"),
        f.Formula(f"model states a rank, {layout.shard}", "16 Phi / (P T), shared by ZeRO", "arXiv:1910.02054", "bytes",
                  f.model_state_bytes(total / (layout.pipeline * layout.tensor), shard=layout.shard, replicas=replicas,
                                      mixed=job.masters),
                  states, _why_states(job, layout)),
        f.Formula("PP x ZeRO-1 a GPU", "(4 + 12 / D) Phi / (P T)", "arXiv:1910.02054", "bytes",
                  f.pipeline_zero1_bytes(total, layout), states, _why_states(job, layout)),
        f.Formula("activations, GPT", "s b h (34 + 5 a s / h) l", "arXiv:2205.05198", "bytes",
                  f.activations_gpt(config, s, b), plain["activations"],
                  "dropout masks and stored scores that flash attention does not keep"),
        f.Formula("activations, scores recomputed", "34 s b h l", "arXiv:2205.05198", "bytes",
                  f.activations_gpt(config, s, b, recompute="selective"), plain["activations"],
                  "dropout masks; 4 h feed-forward without a gate"),
        f.Formula("activations, GQA + gate + flash", "s b (2 (4 h + 2 H + 2 K + 3 f) + 4 a) l", "arXiv:2305.13245",
                  "bytes", f.activations_modern(config, s, b, itemsize=job.itemsize), plain["activations"],
                  "queries and keys before their rotation, attention's output twice; experts keep less"),
        f.Formula("activations, all recomputed", "2 s b h l", "arXiv:1604.06174", "bytes",
                  f.activations_gpt(config, s, b, recompute="full"),
                  closed_memory(replace(full, recompute="full"), Layout().fitted(1))["activations"],
                  "one layer lives while it is made again"),
        f.Formula("FLOPs of a step", "6 N D", "arXiv:2001.08361", "FLOPs",
                  f.training_flops_6nd(total, job.tokens), exact_flops, _why_flops(job)),
        f.Formula("FLOPs of a step, active", "6 N_active D", "arXiv:2001.08361", "FLOPs",
                  f.training_flops_6nd(parameters.active, job.tokens), exact_flops, _why_flops(job)),
        f.Formula("FLOPs of a step, PaLM", "(6 N_active + 12 l h s) D", "arXiv:2204.02311", "FLOPs",
                  f.training_flops_palm(config, parameters.active, s, job.tokens), exact_flops,
                  "the whole matrix of scores instead of the causal half; the embedding's lookup"),
    ]  # fmt: skip
    if run is not None and job.method == "full":
        here = candidate.memory["activations"] + candidate.memory["casts"]
        table.append(
            f.Formula("activations here, closed form", "as above, / T, / C, x micro-batches in flight, + casts",
                      "plan.closed", "bytes", here, float(run.parts["activations"]),
                      "the run is at its fullest moment, which need not be that of the activations")
        )  # fmt: skip
    whole = sum(plain.values())
    for name, low, high, meaning in f.rules_of_thumb(total):
        exact = weight_bytes(sizes, "bf16", ahead=True) if "load" in name[:4] else whole
        if name.startswith("full"):
            exact = plain["weights"] + plain["gradients"] + plain["optimiser"]
        table.append(f.Formula(name, f"{low / 1e9:,.0f} to {high / 1e9:,.0f} GB" if low < high else "2 Phi", "folklore",
                               "bytes", (low + high) / 2, exact, meaning))  # fmt: skip
    if a.heads and job.method != "full":
        table.append(
            f.Formula(f"{job.method} rank {job.rank}", "r (in + out) a matrix", "arXiv:2106.09685", "parameters",
                      4.0 * 2 * job.rank * config.width * len(config.layers), float(lora_numbers(sizes, job.rank)),
                      "the formula's four square matrices h x h a layer; here all matrices")
        )  # fmt: skip
    return table


def serving_plan(name: str, service: Service, *, context: int, users: list[int] | None = None) -> JsonValue:
    """What the machine serves. users: in one replica, for the table (None: powers of two up to what fits)."""
    fit = service.tokens // context
    if users is None:
        users = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= max(1, fit)]
        users += [fit] if fit > users[-1] else []
    config = service.sizes.config
    return {
        "kind": "serving",
        "name": name,
        "model": _model(Job(service.sizes, 1, context)),
        "machine": _machine(service.cluster, service.reserve),
        "weights": {"dtype": service.dtype, "bytes": service.weights},
        "cache": {
            "dtype": service.cache_dtype,
            "bytes_per_token": config.kv_bytes_per_token(1) * BYTES[service.cache_dtype],
            "bytes_per_token_stored": service.token,
            "tokens": service.tokens,
            "bytes": service.room,
        },
        "prompt_cache_bytes": service.set_aside,
        "replicas": service.replicas,
        "devices_per_replica": service.tensor,
        "context": context,
        "users": {"per_replica": fit, "all": fit * service.replicas},
        "memory_per_device": {
            "weights": service.weights / service.tensor,
            "prompts": service.set_aside / service.tensor,
            "cache": service.room / service.tensor,
        },
        "prefill_tokens_per_s": service.prefill(min(context, config.max_positions)),
        "decode": [
            {
                "users": n, "fits": n <= fit, "tokens_per_s_each": step.each, "tokens_per_s": step.total,
                "seconds": step.seconds, "weights_s": step.weights, "cache_s": step.cache, "links_s": step.links,
            }
            for n in users
            for step in [service.decode(n, context)]
        ],
        "assumptions": service.assumed.__dict__,
    }  # fmt: skip


def _model(job: Job) -> JsonValue:
    config, parameters = job.config, job.config.parameters()
    flops = job.sizes.flops(job.length)
    return {
        "family": config.family,
        "layers": len(config.layers) + len(config.encoder),
        "width": config.width,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "parameters_by_part": {part: n for part, n in parameters.parts.items() if n},
        "forward_flops_per_token": flops.total / job.length,
        "training_flops_per_token": 3 * flops.total / job.length,
        "kv_bytes_per_token": config.kv_bytes_per_token(),
    }


def _machine(cluster: Cluster, reserve: float) -> JsonValue:
    d = cluster.device
    return {
        "device": d.name, "devices": cluster.world, "nodes": cluster.nodes, "per_node": cluster.per_node,
        "memory": d.memory, "reserve": reserve, "flops": dict(d.flops), "bandwidth": d.bandwidth,
        "link": {"kind": d.link_kind, "bytes_per_s": d.link},
        "network": {"kind": d.network_kind, "bytes_per_s": d.network} if cluster.nodes > 1 else None,
    }  # fmt: skip


def _step(job: Job) -> JsonValue:
    return {
        "rows": job.batch, "length": job.length, "tokens": job.tokens, "precision": job.precision,
        "method": job.method, "lora_rank": job.rank if job.method != "full" else None,
        "trained_parameters": job.sizes.total if job.method == "full" else lora_numbers(job.sizes, job.rank),
        "frozen_bytes": 0.0 if job.method == "full" else frozen_bytes(job.sizes, job.method),
    }  # fmt: skip


def _layout(c: Candidate, room: float, tokens: float | None, price: float | None) -> JsonValue:
    t, m = c.time, micro_batches(c.job, c.layout)
    days = None if tokens is None else t.days(tokens)
    return {
        "name": describe_layout(c.layout),
        "layout": c.layout.model_dump(mode="json"),
        "micro_batch": c.job.micro_batch,
        "micro_batches": m,
        "recompute": c.job.recompute,
        "memory": c.memory,
        "bytes": c.bytes,
        "room": room,
        "fits": c.bytes <= room,
        "seconds": {
            "step": t.seconds, "products": t.products, "traffic": t.traffic, "optimiser": t.optimiser,
            "bubble": t.bubble, "links": t.links, "hidden": t.hidden,
        },
        "mfu": t.mfu,
        "tokens_per_s": t.tokens_per_s,
        "tokens_per_day": t.tokens_per_day,
        "days": days,
        "cost": None if tokens is None or price is None else t.cost(tokens, price),
        "communication": {
            axis: {"payload": v.payload, "wire": v.wire, "calls": v.calls}
            for axis, v in volumes(c.job, c.layout).items()
        },
    }  # fmt: skip


def _counted(counted: Counted, room: float) -> JsonValue:
    """The exact counts of a layout, beside its closed forms."""
    found: JsonValue = {"not_counted": counted.why}
    if counted.memory is not None:
        found["memory_run"] = {name: size for name, size in counted.memory.parts.items() if size}
        found["bytes_run"] = counted.memory.peak
        found["fits_run"] = counted.memory.peak <= room
    if counted.seconds is not None:
        found["seconds_run"] = {"step": counted.seconds.total, **counted.seconds.parts}
    if counted.sent is not None:
        found["communication_exact"] = by_axis(counted.sent)
        found["calls"] = [{**sent.__dict__, "wire": sent.wire} for sent in counted.sent]
    return found


def _formula(row: f.Formula) -> JsonValue:
    return {
        "name": row.name, "expression": row.expression, "source": row.source, "unit": row.unit, "value": row.value,
        "exact": row.exact, "off": row.off, "why": row.why,
    }  # fmt: skip


def _compute_optimal(job: Job, tokens: float | None) -> JsonValue:
    """For the compute that this run takes (or 20 tokens a parameter): C = 6 N D."""
    active = job.config.parameters().active
    tokens = tokens if tokens is not None else 20.0 * active
    budget = 6.0 * active * tokens
    laws = {"Chinchilla, approach 3": CHINCHILLA, "Besiroglu et al. 2024": REPLICATION}
    found = {name: law.optimum(budget) for name, law in laws.items()}
    return {
        "flops": budget,
        "parameters": active,
        "tokens": tokens,
        "loss": {name: law.loss(active, tokens) for name, law in laws.items()},
        "optimum": {
            **{name: {"parameters": n, "tokens": d, "loss": laws[name].loss(n, d)} for name, (n, d) in found.items()},
            "D = 20 N": dict(zip(("parameters", "tokens"), rule_of_twenty(budget), strict=True)),
        },
    }


def _why_parameters(job: Job) -> str:
    c, reasons = job.config, []
    a, ff = c.layers[-1].attention, c.layers[-1].feed_forward
    if getattr(a, "kv_heads", a.heads) != a.heads:
        reasons.append("grouped key heads")
    if not hasattr(a, "head_dim"):
        reasons.append("latent attention")
    if ff.gated:
        reasons.append("a gated feed-forward")
    if hasattr(ff, "router"):
        reasons.append("experts")
    if not c.tied_embeddings and c.head is not None:
        reasons.append("a head of its own")
    return ", ".join(reasons)


def _why_states(job: Job, layout: Layout) -> str:
    reasons = []
    if job.method != "full":
        reasons.append(f"{job.method}: only A and B have gradients and states")
    if layout.tensor > 1 or layout.pipeline > 1:
        reasons.append("norms and routers are whole, stages differ, embedding and head stand at the ends")
    if layout.expert > 1:
        reasons.append("experts are shared by the expert ranks")
    if not job.masters and layout.shard != "none":
        reasons.append("fp32 weights, no second copy: 4 + 4 + 8")
    return "; ".join(reasons)


def _why_flops(job: Job) -> str:
    sparse = job.config.parameters().active != job.config.parameters().total
    return "no scores; the embedding's lookup counted as a product" + ("; all experts" if sparse else "")
