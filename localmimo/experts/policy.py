"""Policy: which page gives way. Pure decisions over pages; knows no bytes, no torch, no disk."""

from collections import OrderedDict
from collections.abc import Callable

Page = tuple[int, int]  # (layer, expert)


class Lru:
    """The least recently used page gives way."""

    def __init__(self) -> None:
        self._order: OrderedDict[Page, None] = OrderedDict()

    def touch(self, page: Page) -> None:
        """`page` is used now."""
        self._order[page] = None
        self._order.move_to_end(page)

    def victim(self, may_go: Callable[[Page], bool]) -> Page | None:
        """The page to evict, among those that may go; forgets it. None if none may."""
        page = next((page for page in self._order if may_go(page)), None)
        if page is not None:
            del self._order[page]
        return page

    def forget(self, page: Page) -> None:
        """`page` is no longer held."""
        self._order.pop(page, None)
