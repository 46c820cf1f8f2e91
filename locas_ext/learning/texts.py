"""The list of the texts that a memory has learned from."""

from datetime import datetime, timezone

from locas_ext.state.stream import TextRecord


def learned_now(title: str | None, digest: str, tokens: int) -> TextRecord:
    """The record of a text whose latest tokens were learned just now."""
    return TextRecord(title, digest, tokens, datetime.now(timezone.utc).isoformat())


def record_of(texts: list[TextRecord], digest: str, tokens: int) -> TextRecord | None:
    """The latest record of exactly this much of a text, for a run that continues it."""
    return next((record for record in reversed(texts) if (record.digest, record.tokens) == (digest, tokens)), None)


def put_record(texts: list[TextRecord], before: TextRecord | None, now: TextRecord) -> None:
    """Puts a text's new record in the place of its earlier one, or at the end."""
    if before in texts:
        texts[texts.index(before)] = now
    else:
        texts.append(now)
