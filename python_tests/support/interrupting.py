"""Runs that are stopped after some chunks."""


class Stop(Exception):
    pass


def stop_after(chunks, error=Stop):
    """A callback that raises once `chunks` chunks are done."""
    seen = []

    def callback(chunk):
        seen.append(chunk)
        if len(seen) == chunks:
            raise error

    return callback
