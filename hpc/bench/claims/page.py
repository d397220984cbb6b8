"""Audited claims as text: a page that can be read, and checked with a pocket calculator."""

from collections.abc import Iterable, Iterator
from textwrap import wrap

from hpc.bench.claims.claim import Claim

WIDTH = 118


def figure(value: float) -> str:
    """A number as it stands in a line of arithmetic: six significant digits, 1.28e+18 where it is large."""
    return f"{value:.6g}"


def page(claims: Iterable[Claim]) -> str:
    """All claims, then one line each."""
    told = list(claims)
    summary = [f"  {claim.name:<24} {claim.verdict}" for claim in told]
    return "\n".join([*("\n".join(_claim(claim)) + "\n" for claim in told), "verdicts", *summary])


def _claim(claim: Claim) -> Iterator[str]:
    yield f"{claim.name} ({claim.kind})"
    yield "=" * (len(claim.name) + len(claim.kind) + 3)
    yield from _paragraph("claim", claim.statement)
    yield from _paragraph("said by", claim.said_by)
    if claim.premises:
        yield "premises"
    for premise in claim.premises:
        yield from _entry(f"{premise.name}: {figure(premise.value)} {premise.unit}".rstrip(), premise.source)
    if claim.arithmetic:
        yield "arithmetic"
    for step in claim.arithmetic:
        yield from _entry(step.name, f"{step.line} = {figure(step.value)} {step.unit}".rstrip())
    if claim.measured:
        yield "measured here"
    for told in claim.measured:
        value = "not known" if told.value is None else f"{figure(told.value)} {told.unit}".rstrip()
        yield from _entry(f"{told.name}: {value}", told.provenance)
    because = (
        f" {claim.because}" if claim.verdict == "holds if" else f". {claim.because[:1].upper()}{claim.because[1:]}"
    )
    yield from _paragraph("verdict", claim.verdict.upper() + because)
    yield "depends on"
    for reason in claim.depends_on:
        yield from wrap(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _paragraph(word: str, text: str) -> Iterator[str]:
    yield from wrap(text, WIDTH, initial_indent=f"{word:<10}", subsequent_indent=" " * 10)


def _entry(head: str, tail: str) -> Iterator[str]:
    """Head and tail on one line where they fit, else the tail below."""
    if len(head) + len(tail) + 6 <= WIDTH:
        yield f"  {head}  [{tail}]" if "=" not in tail else f"  {head}: {tail}"
        return
    yield f"  {head}"
    yield from wrap(tail, WIDTH, initial_indent="      ", subsequent_indent="      ")
