"""What `fedlora plan` prints."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlora.errors import counted
from fedlora.privacy.wording import named, neighbours, protected
from fedlora.reports.console import size, span
from fedlora.reports.tables import Table, filled


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """What `fedlora plan` prints, from `Plan.to_json`."""
    rounds, private = plan["rounds"], plan["epsilon"] is not None
    trained = plan["parameters"]["adapter"] + plan["parameters"]["head"]
    lines = [
        f"{plan['scenario']}: {len(rounds)} rounds of {plan['strategy']}, {rounds[0]['clients']} of "
        f"{plan['clients_total']} clients in the first",
        f"  trains    {trained:,} numbers: {plan['parameters']['adapter']:,} in the adapter, "
        f"{plan['parameters']['head']:,} in the head, beside {plan['parameters']['base']:,} frozen",
        f"  bytes     up {size(plan['bytes_up_total'])}, down {size(plan['bytes_down_total'])}; in round 1 "
        f"up {size(rounds[0]['bytes_up'])}, down {size(rounds[0]['bytes_down'])}; all clients together",
    ]
    if (statistic := plan["statistics"]) is not None:
        lines.append(
            f"            {size(statistic['bytes_up'])} of these go up before round 1, for the statistic "
            "that cuts the base"
        )
    if plan["virtual_seconds"] is not None:
        late = counted(sum(line["late"] for line in rounds), "client")
        lines.append(f"  devices   {plan['virtual_seconds'] / 3600:.2f} virtual hours; {late} late or gone")
    what = "person" if "num_persons" in plan["groups"][0] else "example"
    if private:
        lines.append(
            f"  privacy   epsilon {plan['epsilon']:.3f} at delta {plan['delta']:g} for each "
            f"{protected(plan['unit'], plan['person'])}; noise multiplier up to {plan['noise_multiplier']:g};"
        )
        if turns := named(g.get("bands", 1) for g in plan["groups"]):
            lines.append(f"            {turns}, by the {what}s that a client holds")
        elif plan["unit"] == "client" and (turns := named([plan["signal"]["bands"]])):
            left = f"{plan['in_weights']:.2f} of the noise of independent rounds is left in the weights"
            lines.append(f"            {turns}: clients take turns by round, and {left}")
        lines.append(f"            {neighbours(plan['unit'])}")
    if plan["own_epsilon"] is not None:
        lines.append(
            "            from all who see sums, the server too; under a client's own noise alone, epsilon "
            f"{plan['own_epsilon']:.3f}"
        )
    elif plan["server_epsilon"] is not None:
        lines.append(
            f"            from the server, which sees sums, epsilon {plan['server_epsilon']:.3f} if all stay"
        )
    if plan["peer_epsilon"] is not None:
        lines.append(f"            from a client in all of the same rounds, epsilon {plan['peer_epsilon']:.3f}")
    if (told := plan["signal"]) is not None:
        step = "round" if told["batch_size"] is None else "step"
        lines.append(
            f"  signal    in the mean of a {step} at most {told['bound']:g} long, "
            f"beside noise {told['noise_length']:.3g} long,"
        )
        lines.append(
            f"            {told['noise']:.3g} in each number: {told['ratio']:.3g} to 1; over all "
            f"{told['steps']:,} {step}s {told['run_ratio']:.3g} to 1"
        )
    if plan["seconds"] is None:
        lines.append("  estimate  no time and memory: the base model's weights, or a GPU, are not at hand")
    else:
        lines.append(
            f"  estimate  {span(plan['seconds'])} for the rounds on this machine, {plan['workers']} training at "
            f"once with {size(plan['memory_bytes'])} of memory each; from a few steps just taken"
        )
        if statistic is not None:
            lines.append(f"            about {span(statistic['seconds'])} before, for the statistic and the cut")
        lines.append("            the start (rows, noise, model) and the end (adapter, card) come on top")
    if plan["frozen_bytes"] is not None:
        lines.append(
            f"  disk      {size(plan['frozen_bytes'])} of what the frozen layers make of the examples, once"
        )
    if plan["stopped"]:
        lines.append(f"  stops     {plan['stopped']}")
    lines = [part for line in lines for part in filled(line, indent=12)]
    if private:
        told = [line for line in rounds if "epsilon" in line]
        told = [told[i] for i in _spread(len(told), 10)]
        rows = [[str(t["round"]), f"{t['epsilon']:.3f}", f"{t['epsilon_median']:.3f}"] for t in told]
        lines += ["", "epsilon after a round, the largest over clients and the median"]
        lines += Table(("round", "largest", "median"), rows, frozenset()).text()
    banded = "bands" in plan["groups"][0]
    if private and banded and max(g["bands"] for g in plan["groups"]) > 1:
        one = "row" if what == "example" else what
        lines.append(
            f"  under privacy.bands a {one} has a turn once in as many steps as there are bands, and a turn is "
            "paid whole at its first step: epsilon rises by turns, not by rounds"
        )
    if private and "epsilon" in plan["groups"][0]:
        groups = [plan["groups"][i] for i in _spread(len(plan["groups"]), 12)]
        rows = [
            [
                f"{g[f'num_{what}s']:,}",
                str(g["clients"]),
                f"{g['sample_rate']:.3%}",
                f"{g['noise_multiplier']:g}",
                f"{g['epsilon']:.3f}",
                *([str(g["bands"]), f"{g['in_weights']:.2f}"] if banded else []),
            ]
            for g in groups
        ]
        left_out = len(plan["groups"]) - len(groups)
        lines += ["", f"clients by their {what}s{f' ({left_out} sizes left out)' if left_out else ''}"]
        head = (f"{what}s", "clients", "sample rate", "noise", "epsilon")
        more = ("bands", "in the weights, over DP-SGD's") if banded else ()
        lines += Table((*head, *more), rows, frozenset()).text()
    about = any(not a.get("exact", True) for a in plan["alternatives"])
    lines += ["", f"the same under each built-in strategy{', estimated from its first rounds' if about else ''}"]
    rows = [
        [a["strategy"], size(a["bytes_up_total"]), size(a["bytes_down_total"]), f"{a['adapter'] + a['head']:,}"]
        for a in plan["alternatives"]
        if "problem" not in a
    ]
    lines += Table(("strategy", "up", "down", "trained"), rows).text()
    lines += _refused(plan["alternatives"], "strategy")
    lines += ["", f"{plan['strategy']} with each kind of adapter; up is of a client and round, in float32"]
    reached = "noise in the weights" if private else "noise gain"
    rows = [
        [
            k["kind"],
            _or_dash(k["bytes_up"], size),
            f"{k['adapter'] + k['head']:,}",
            _or_dash(k.get("noise", k["gain"]), "{:.3g}".format),
        ]
        for k in plan["kinds"]
        if "problem" not in k
    ]
    lines += Table(("kind", "up", "trained", reached), rows).text()
    lines += _refused(plan["kinds"], "kind")
    lines += advice_lines(plan["advice"], what) if plan["advice"] else []
    return lines + [line for text in plan["warnings"] for line in ("", *filled(f"warning: {text}"))]


def _refused(rows: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """What has no line in a table, and why: names that have one reason together."""
    why: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "problem" in row:
            why.setdefault(re.sub(rf"\b{re.escape(row[what])}\b", "it", row["problem"]), []).append(row)
    told = [
        f"  {', '.join(row[what] for row in alike)}: {reason if len(alike) > 1 else alike[0]['problem']}"
        for reason, alike in why.items()
    ]
    return [line for one in told for line in filled(one)]


def _or_dash(value: Any, write: Callable[[Any], str]) -> str:
    return "-" if value is None else write(value)


def advice_lines(advice: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """What `fedlora plan --advise` prints; `what` is sampled, such as `example`."""
    banded = any(line["bands"] > 1 for line in advice)
    rows = [
        [
            f"{line['run_ratio']:.2f}",
            f"{line['batch_size']:,}",
            str(line["local_steps"]),
            f"{line['rounds']:,}",
            ",".join(map(str, line["layers"])),
            str(line["r"]),
            f"{line['numbers']:,}",
            f"{line['noise_multiplier']:.3g}",
            *([str(line["bands"])] if banded else []),
            size(line["bytes_up_total"] + line["bytes_down_total"]),
            "-" if line["seconds"] is None else span(line["seconds"]),
            "" if line["set"] else "as it is",
        ]
        for line in advice
    ]
    noise = ("noise", "bands") if banded else ("noise",)
    head = ("ratio", "batch", "steps", "rounds", "layers", "r", "trained", *noise, "bytes", "time", "")
    best, now = advice[0], next(line for line in advice if not line["set"])
    same = f"as many {what}s, or all in each step"
    told = ["", f"signal over noise of the whole run at this epsilon, by arithmetic alone: {same}"]
    told += [*Table(head, rows, frozenset({4, len(head) - 1})).text(), ""]
    if not best["set"]:
        return [*told, "as it is, it has the best ratio of these"]
    more = best["run_ratio"] / now["run_ratio"]
    return [*told, f"advice: {more:.2f} times the ratio by  {best['set']}  (then tune the learning rate again)"]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, evenly spread, with the first and the last."""
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)}) if count else []
