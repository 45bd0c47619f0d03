"""A plan on a terminal: the values of `plan.report`, as tables and bars."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hanlin.plan.chart import GIB, Bar, terminal_bar


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
        console.print(_layouts(plan))
        first = layouts[0]
        console.print(f"\n[bold]Memory of the fullest rank[/], {first['name']}")
        for line in terminal_bar(Bar("", first["memory"], first["room"])):
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
    if plan["searched"]:
        console.print(f"\n[bold]Why the others fail[/] ({plan['searched']['tried']:,} variants tried)")
        for why, count in plan["searched"]["failed"].items():
            console.print(f"  {count:>7,}  {why}")
    if plan.get("formulas"):
        console.print("\n[bold]Classic formulas beside the exact count[/]")
        console.print(_formulas(plan["formulas"]))
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
    console.print("\n[bold]Memory of a device[/]")
    room = plan["machine"]["memory"] - plan["machine"]["reserve"]
    for line in terminal_bar(Bar("", plan["memory_per_device"], room)):
        console.print(line)
    console.print(f"\n[bold]Decoding[/] with {plan['context']:,} tokens in each cache (roofline)")
    table = _table("users", "tok/s each", "tok/s all", "ms a step", "weights", "caches", "links", "")
    for row in plan["decode"]:
        parts = [f"{row[name] / row['seconds']:.0%}" for name in ("weights_s", "cache_s", "links_s")]
        table.add_row(f"{row['users']:,}", f"{row['tokens_per_s_each']:.1f}", f"{row['tokens_per_s']:,.0f}",
                      f"{row['seconds'] * 1e3:.2f}", *parts, "" if row["fits"] else "more than fit")  # fmt: skip
    console.print(table)
    if plan.get("published"):
        console.print("\n[bold]Beside the published table[/]")
        table = _table("what", "published", "here", "here / published", "why")
        for row in plan["published"]:
            table.add_row(row["what"], row["published"], row["here"], row["ratio"], row["why"])
        console.print(table)


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


def _layouts(plan: Mapping[str, Any]) -> Table:
    table = _table("layout", "rows at once", "recompute", "GiB", "s a step", "MFU", "tokens/day", "days", "cost")
    for row in plan["layouts"]:
        cost, days = row["cost"], row["days"]
        table.add_row(
            row["name"] + ("" if row["fits"] else "  (does not fit)"), f"{row['micro_batch']} x {row['micro_batches']}",
            row["recompute"], f"{row['bytes'] / GIB:.1f}", f"{row['seconds']['step']:.4g}", f"{row['mfu']:.1%}",
            quantity(row["tokens_per_day"]), "" if days is None else f"{days:,.1f}",
            "" if cost is None else f"{cost:,.0f}",
        )  # fmt: skip
    return table


def _two_counts(row: Mapping[str, Any]) -> Table:
    table = _table("category", "closed form, GiB", "run on fake tensors, GiB")
    names = dict.fromkeys([*row["memory"], *row["memory_run"]])
    for name in names:
        a, b = row["memory"].get(name, 0.0), row["memory_run"].get(name, 0.0)
        if a or b:
            table.add_row(name, f"{a / GIB:.2f}", f"{b / GIB:.2f}")
    whole = [sum(row[key].values()) for key in ("memory", "memory_run")]
    table.add_row("all", f"{whole[0] / GIB:.2f}", f"{whole[1] / GIB:.2f} ({whole[0] / whole[1] - 1:+.0%})")
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


def _formulas(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("formula", "", "it says", "exact", "off", "because of")
    for row in rows:
        show = _bytes if row["unit"] == "bytes" else quantity
        off = "" if row["off"] is None else f"{row['off']:+.1%}"
        exact = "" if row["exact"] is None else show(row["exact"])
        table.add_row(row["name"], row["expression"], show(row["value"]), exact, off, row["why"])
    return table


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


def _bytes(n: float) -> str:
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(n) >= limit:
            return f"{n / limit:.3g} {unit}"
    return f"{n:.0f} B"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for i, title in enumerate(titles):
        words = title in ("", "because of", "why", "recompute", "what", "published", "here")
        table.add_column(title, justify="left" if i == 0 or words else "right", overflow="fold")
    return table
