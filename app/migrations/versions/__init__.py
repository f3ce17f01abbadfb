"""The steps, in the order of their numbers. One that was released is never changed."""

__all__: list[str] = []
