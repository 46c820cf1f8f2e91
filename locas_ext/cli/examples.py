"""Examples at the end of a command's --help."""


def examples(lines: tuple[str, ...]) -> str:
    """A paragraph per example, as typer joins the lines of one. No line holds markup."""
    return "\n\n".join(["Examples:", *lines])
