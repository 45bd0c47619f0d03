"""A plan on a terminal: the values of `plan.report`, as tables and bars."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hanlin.plan.chart import GIB, Bar, memory_unit, terminal_bar

EXPRESSION = 46  # characters of a formula that stand beside its name


def print_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """To stdout; without colours where that is no terminal."""
    console = console or Console(soft_wrap=False, highlight=False)
    if plan["kind"] == "serving":
        _serving(plan, console)
    else:
        _training(plan, console)


def _training(plan: Mapping[str, Any], console: Console) -> None:
    step = plan["step"]
    _head(plan, console)
    lora = "" if step["method"] == "full" else f", {step['method']} rank {step['lora_rank']}"
    console.print(
        f"one step: {step['rows']:,} rows of {step['length']:,} = {quantity(step['tokens'])} tokens, "
        f"{step['precision']}{lora}, {quantity(step['trained_parameters'])} parameters trained"
    )
    for note in plan["notes"]:
        console.print(f"  assumed: {note}", style="bright_black")
    layouts = plan["layouts"]
    if plan["searched"] and not plan["searched"]["fits"]:
        console.print("\n[bold red]No layout fits.[/] The one that needs least:")
    elif layouts:
        console.print("\n[bold]Layouts[/]" + (", fastest first" if len(layouts) > 1 else ""))
    if layouts:
        for line in _layouts(layouts, console.width):
            console.print(line)
        first = layouts[0]
        console.print(f"\n[bold]Memory of the fullest rank[/], {first['name']}")
        for line in terminal_bar(Bar("", first["memory"], first["room"]), min(60, console.width - 24)):
            console.print(line)
        if first.get("memory_run"):
            console.print(_two_counts(first))
            if not first["fits_run"]:
                console.print("[bold red]Run on fake tensors it does not fit:[/] take one below it, or more devices.")
        for what, why in first.get("not_counted", {}).items():
            console.print(f"  {what} not counted exactly: {why}", style="bright_black")
        console.print(f"\n[bold]Time of a step[/], {first['seconds']['step']:.4g} s")
        if "seconds_run" in first:
            found = first["seconds_run"]["step"]
            console.print(f"  {found:.4g} s by this machine's own rates, operation by operation")
        console.print(_time(first))
        if first["communication"]:
            console.print("\n[bold]Communication[/] of one rank in one step")
            console.print(_communication(first))
    if plan["searched"] and plan["searched"]["failed"]:
        console.print(f"\n[bold]Why the others fail[/] ({plan['searched']['tried']:,} variants tried)")
        for why, count in plan["searched"]["failed"].items():
            console.print(f"  {count:>7,}  {why}")
    if plan.get("formulas"):
        console.print("\n[bold]Classic formulas beside the exact count[/]")
        for line in _formulas(plan["formulas"], console.width):
            console.print(line)
    _optimal(plan["compute_optimal"], console)


def _serving(plan: Mapping[str, Any], console: Console) -> None:
    _head(plan, console)
    cache, weights = plan["cache"], plan["weights"]
    console.print(
        f"{plan['replicas']} replica{'s' * (plan['replicas'] > 1)} of {plan['devices_per_replica']} devices: weights "
        f"{weights['bytes'] / 1e9:,.1f} GB ({weights['bytes'] / GIB:,.1f} GiB) in {weights['dtype']}, cache "
        f"{cache['bytes'] / 1e9:,.1f} GB in {cache['dtype']} = {cache['tokens']:,} tokens at "
        f"{cache['bytes_per_token_stored']:,.0f} bytes ({cache['bytes_per_token']:,.0f} without copies)"
    )
    fit = plan["users"]
    console.print(
        f"requests of {plan['context']:,} tokens at once: {fit['per_replica']:,} a replica, {fit['all']:,} in all; "
        f"prefill {plan['prefill_tokens_per_s']:,.0f} tokens/s a replica"
    )
    for note in plan.get("notes", []):
        console.print(f"  assumed: {note}", style="bright_black")
    console.print("\n[bold]Memory of a device[/]")
    room = plan["machine"]["memory"] - plan["machine"]["reserve"]
    for line in terminal_bar(Bar("", plan["memory_per_device"], room), min(60, console.width - 24)):
        console.print(line)
    console.print(f"\n[bold]Decoding[/] with {plan['context']:,} tokens in each cache (roofline)")
    table = _table("users", "tok/s each", "tok/s all", "ms a step", "weights", "caches", "links", "")
    for row in plan["decode"]:
        parts = [f"{row[name] / row['seconds']:.0%}" for name in ("weights_s", "cache_s", "links_s")]
        table.add_row(f"{row['users']:,}", f"{row['tokens_per_s_each']:.1f}", f"{row['tokens_per_s']:,.0f}",
                      f"{row['seconds'] * 1e3:.2f}", *parts, "" if row["fits"] else "more than fit")  # fmt: skip
    console.print(table)
    if plan.get("measured"):
        found = plan["measured"]
        console.print(
            f"\n[bold]Beside what the engine does here[/]: 1 request in {found['dtype']}, {found['prompt_tokens']} "
            f"tokens read, {found['answer_tokens']} written"
        )
        table = _table("tokens/s", "predicted", "measured", "measured / predicted")
        for name, row in found["tokens_per_s"].items():
            table.add_row(name, f"{row['predicted']:,.1f}", f"{row['measured']:,.1f}",
                          f"{row['measured_of_predicted']:.0%}")  # fmt: skip
        console.print(table)
    if plan.get("published"):
        console.print("\n[bold]Beside the published table[/]")
        table = _table("what", "published", "here", "here / published")
        for row in plan["published"]:
            table.add_row(row["what"], row["published"], row["here"], row["ratio"])
        console.print(table)
        for why in dict.fromkeys(row["why"] for row in plan["published"]):
            console.print(f"  {why}", style="bright_black")


def _head(plan: Mapping[str, Any], console: Console) -> None:
    model, machine = plan["model"], plan["machine"]
    active = model["active_parameters"]
    more = f" ({active:,} active)" if active != model["parameters"] else ""
    console.print(f"[bold]{plan['name']}[/]: {model['family']}, {model['layers']} layers of width {model['width']:,}")
    console.print(f"parameters {model['parameters']:,}{more}")
    parts = ", ".join(f"{part} {n / model['parameters']:.1%}" for part, n in model["parameters_by_part"].items())
    console.print(f"  {parts}", style="bright_black")
    console.print(
        f"FLOPs a token {quantity(model['forward_flops_per_token'])} forward, "
        f"{quantity(model['training_flops_per_token'])} in training; {model['kv_bytes_per_token']:,} bytes of cache"
    )
    where = f"{machine['nodes']} nodes of " if machine["nodes"] > 1 else ""
    network = f", {machine['network']['kind']} between nodes" if machine["network"] else ""
    console.print(
        f"on {where}{machine['per_node']} x {machine['device']}: {machine['memory'] / GIB:.1f} GiB each, "
        f"{machine['reserve'] / GIB:.1f} kept free; {machine['link']['kind']}{network}"
    )


def _layouts(rows: Sequence[Mapping[str, Any]], width: int) -> list[Text]:
    """A line a layout; where it would be too long, its name above its figures. Columns that say nothing are
    left out."""
    names = [row["name"] + ("" if row["fits"] else "  (does not fit)") for row in rows]
    scale, unit = memory_unit(max(row["bytes"] for row in rows))
    known = [row["days"] for row in rows if row["days"] is not None]
    span, seconds = _time_unit(min(known, default=1.0) * 86400)
    columns = {
        "rows at once": [f"{row['micro_batch']} x {row['micro_batches']}" for row in rows],
        "recompute": [row["recompute"] for row in rows],
        unit: [f"{row['bytes'] / scale:,.1f}" for row in rows],
        "s a step": [f"{row['seconds']['step']:.4g}" for row in rows],
        "MFU": [f"{row['mfu']:.1%}" for row in rows],
        "tokens/day": [quantity(row["tokens_per_day"]) for row in rows],
        span: ["" if row["days"] is None else f"{row['days'] * 86400 / seconds:,.1f}" for row in rows],
        "cost": ["" if row["cost"] is None else _figure(row["cost"]) for row in rows],
    }
    shown = {title: cells for title, cells in columns.items() if set(cells) - {"", "none"}}
    head, *lines = _aligned([list(shown), *zip(*shown.values(), strict=True)])
    longest = max(map(len, [*names, "layout"]))
    if longest + 2 + len(head) <= width:
        whole = [f"{name:<{longest}}  {line}" for name, line in zip(names, lines, strict=True)]
        return [Text(f"{'layout':<{longest}}  {head}", style="bright_black"), *map(Text, whole)]
    pairs = [Text(line) for name, figures in zip(names, lines, strict=True) for line in (name, f"  {figures}")]
    return [Text(f"  {head}", style="bright_black"), *pairs]


def _time_unit(seconds: float) -> tuple[str, float]:
    return next(((name, n) for name, n in (("days", 86400.0), ("hours", 3600.0)) if seconds >= n), ("seconds", 1.0))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, every column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]


def _two_counts(row: Mapping[str, Any]) -> Table:
    whole = [sum(row[key].values()) for key in ("memory", "memory_run")]
    scale, unit = memory_unit(max(whole))
    table = _table("category", f"closed form, {unit}", f"run on fake tensors, {unit}")
    names = dict.fromkeys([*row["memory"], *row["memory_run"]])
    for name in names:
        a, b = row["memory"].get(name, 0.0), row["memory_run"].get(name, 0.0)
        if a or b:
            table.add_row(name, f"{a / scale:.2f}", f"{b / scale:.2f}")
    table.add_row("all", f"{whole[0] / scale:.2f}", f"{whole[1] / scale:.2f} ({whole[0] / whole[1] - 1:+.0%})")
    return table


def _time(row: Mapping[str, Any]) -> Table:
    seconds = row["seconds"]
    table = _table("what", "seconds", "share")
    parts = {
        "products": seconds["products"], "norms, activations, casts": seconds["traffic"],
        "optimizer": seconds["optimiser"], "waiting (pipeline)": seconds["bubble"],
        **{f"links: {axis}": s for axis, s in seconds["links"].items()},
    }  # fmt: skip
    for name, s in parts.items():
        if s:
            table.add_row(name, f"{s:.4g}", f"{s / seconds['step']:.1%}")
    if seconds["hidden"]:
        table.add_row("links, hidden behind products", f"({seconds['hidden']:.4g})", "")
    return table


def _communication(row: Mapping[str, Any]) -> Table:
    exact = row.get("communication_exact")
    table = _table(
        "axis", "textbook", *(("exact", "off", "on the wire", "calls") if exact else ("on the wire", "calls"))
    )
    said = row["communication"]
    names = {"ring": "context", "ulysses": "context"}
    for axis in dict.fromkeys([*(names.get(axis, axis) for axis in said), *(exact or {})]):
        textbook = sum(v["payload"] for name, v in said.items() if names.get(name, name) == axis)
        if exact is None:
            v = next(v for name, v in said.items() if names.get(name, name) == axis)
            table.add_row(axis, _bytes(v["payload"]), _bytes(v["wire"]), f"{v['calls']:,.0f}")
            continue
        v = exact.get(axis, {"payload": 0.0, "wire": 0.0, "calls": 0.0})
        off = f"{textbook / v['payload'] - 1:+.1%}" if textbook and v["payload"] else ""
        table.add_row(axis, _bytes(textbook) if textbook else "", _bytes(v["payload"]), off, _bytes(v["wire"]),
                      f"{v['calls']:,.0f}")  # fmt: skip
    return table


def _formulas(rows: Sequence[Mapping[str, Any]], width: int) -> list[Text]:
    """A line a formula; below it, dim, why it is off, where it is off by 1 % or more. The formula itself stands in the
    line, if it is wide enough."""
    cells = []
    for row in rows:
        show = _bytes if row["unit"] == "bytes" else quantity
        off = "" if row["off"] is None else f"{row['off']:+.1%}"
        cells.append([show(row["value"]), "" if row["exact"] is None else show(row["exact"]), off])
    head, *figures = _aligned([["it says", "exact", "off"], *cells])
    longest = max(len(row["name"]) for row in rows)
    beside = EXPRESSION if longest + EXPRESSION + len(head) + 4 <= width else 0
    gap = " " * (beside + 2) if beside else ""
    lines = [Text(f"{'formula':<{longest}}  {gap}{head}", style="bright_black")]
    before = ""
    for row, line in zip(rows, figures, strict=True):
        why = row["why"] if row["off"] is not None and abs(row["off"]) >= 0.01 else ""
        expression = "" if row["source"] == "folklore" else row["expression"]  # its name says it
        if 0 < len(expression) <= beside:
            lines.append(Text(f"{row['name']:<{longest}}  {expression:<{beside}}  {line}"))
            expression = ""
        else:
            lines.append(Text(f"{row['name']:<{longest}}  {gap}{line}"))
        again = "the same" if expression else ""
        below = ": ".join(filter(None, (expression, again if why and why == before else why)))
        lines += [Text(part, style="bright_black") for part in textwrap.wrap(below, width - 2, initial_indent="  ",
                                                                              subsequent_indent="    ")]  # fmt: skip
        before = why or before
    return lines


def _optimal(found: Mapping[str, Any], console: Console) -> None:
    console.print(
        f"\n[bold]Compute-optimal[/] for C = 6 N D = {quantity(found['parameters'])} x {quantity(found['tokens'])} x 6 "
        f"= {found['flops']:.3g} FLOPs"
    )
    table = _table("law", "parameters", "tokens", "loss there", "loss here")
    for name, row in found["optimum"].items():
        there = f"{row['loss']:.3f}" if "loss" in row else ""
        here = f"{found['loss'][name]:.3f}" if name in found["loss"] else ""
        table.add_row(name, quantity(row["parameters"]), quantity(row["tokens"]), there, here)
    console.print(table)


def quantity(n: float) -> str:
    """512, 2.05k, 17.5M, 1.20G, 15T, 449P, 3.8E."""
    for limit, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit * 0.9995 <= abs(n) < limit * 1e6:
            return f"{n / limit:.3g}{suffix}"
    return f"{n:.3g}"


def _figure(n: float) -> str:
    """1,838, 12.5, 0.043, 0.0002."""
    return f"{n:,.0f}" if n >= 1000 else f"{n:.3g}"


def _bytes(n: float) -> str:
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(n) >= limit:
            return f"{n / limit:.3g} {unit}"
    return f"{n:.0f} B"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for i, title in enumerate(titles):
        words = title in ("", "why", "what", "published", "here")
        table.add_column(title, justify="left" if i == 0 or words else "right", overflow="fold", no_wrap=not words)
    return table
