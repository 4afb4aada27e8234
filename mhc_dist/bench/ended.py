"""What a bench raises when one of its processes is gone."""


class RankEndedError(RuntimeError):
    """A process of the bench ended before it had measured; not for what the user asked."""
