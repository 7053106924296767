"""Writes the newest figures of benchmarks/results into the README, between two markers for each kind."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cpu", "ep", "placement", "dynamic", "llep")


def markdown(result: dict, source: str) -> str:  # type: ignore[type-arg]
    """The rows that have a bar, and the machine they were measured on."""
    machine = result["machine"]
    lines = ["| what | measured | bar | beside it in the same run |", "|---|---|---|---|"]
    for row in result["rows"]:
        if row["bar"] is None:
            continue
        digits = 4 if row["unit"] == "×" else 3
        value = f"{row['value']:.{digits}g}" if isinstance(row["value"], float) else str(row["value"])
        sign = {">=": "≥", "<=": "≤"}[row["bar_is"]]
        missed = "" if row["met"] else " **missed**"
        lines.append(f"| {row['name']} | {value} {row['unit']}{missed} | {sign} {row['bar']:g} | {row['peer']} |")
    lines += [
        "",
        f"Measured {result['date']} on one thread of a {machine['cpu']} with {machine['cores']} cores "
        f"(Python {machine['python']}, torch {machine['torch']}, HiGHS {machine['highs']}); `make bench`, "
        f"[{source}]({source}).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the blocks in the README."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for kind in KINDS:
        start, end = f"<!-- figures: benchmarks/readme_table.py {kind} -->", f"<!-- end of figures {kind} -->"
        newest = max((ROOT / "benchmarks" / "results").glob(f"{kind}-*.json"))
        table = markdown(json.loads(newest.read_text()), newest.relative_to(ROOT).as_posix())
        head, rest = text.split(start)
        text = f"{head}{start}\n{table}\n{end}{rest.split(end)[1]}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
