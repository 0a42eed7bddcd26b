"""Adaptive: the policy that the store uses. It forecasts when each page is used next, and learns whom to believe.

Two forecasts per page: its chance at its layer's next turn, and its chance per token after that. Both are mixtures of
what the page did lately (decayed means of RouterStats), of what followed tokens like the present one (Recall), of how
long it has not been used (Ages) and of plain ignorance; the weights of the mixtures follow the traffic. Knows pages and
their forecasts; no bytes.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from localmimo.experts.policy.recency import Recency
from localmimo.experts.policy.router_stats import HALF_LIVES, Page, RouterStats
from localmimo.experts.policy.similar_tokens import SHARPNESS, SimilarTokens

N_ROUNDS = (4, 16)  # forecasts per token, at least and at most, where pages are missed
FORECAST_PAGES = 1 << 15  # pages looked at per token, if that makes no fewer rounds
LATER_ROUNDS = 2  # what is recalled for the tokens after the next turn is worked out every second time
LINE = 64  # victims looked for in advance
LEARNING = 0.05  # of a mixture's weights, per layer
TRUST_IN_AGE = 0.5  # at the start: recency alone is LRU, which is never far wrong
SNAPSHOT_TOKENS = 4  # forecasts of later tokens are judged by the tokens that follow a snapshot
LEAST_CHANCE = 1e-4
_N_MEANS = len(HALF_LIVES)
_RECALLED = slice(_N_MEANS, _N_MEANS + len(SHARPNESS))
_AGED, _ALIKE = -2, -1  # by age; every expert alike
_N_VIEWS = _RECALLED.stop + 2

Array = NDArray[np.float32]
Places = NDArray[np.intp]


class Adaptive:
    """The page whose next use is worth least now gives way: far away, or unlikely before it would be evicted anyway.

    A use t tokens away is worth exp(-t / patience), where patience is about half of the time that a page survives
    here unused: with few slots only the next token counts, with many the long run. A page's rank is its distance,
    -patience * log(worth), in tokens from the beginning of the present one.
    """

    def __init__(self, stats: RouterStats, *, room_for_all: bool = False) -> None:
        """room_for_all: every page has a slot, and none gives way unless slots are taken away: only count."""
        self._stats = stats
        self._only_count = room_for_all
        self._n_rows, n_experts = len(stats.layers), stats.n_experts
        self._recall = SimilarTokens(self._n_rows, n_experts)
        self._forecast = Forecast(stats, self._recall)
        self._turnover = Turnover()
        self._n_held = 0
        self._place = {layer: row * n_experts for row, layer in enumerate(stats.layers)}  # where each begins
        self._distance = np.zeros(self._n_rows * n_experts, dtype=np.float32)
        self._held = np.zeros(self._distance.size, dtype=bool)
        self._line: list[tuple[float, int]] = []  # distances and places of held pages, best victims last
        self._waiting: list[tuple[int, list[int]]] = []  # rows and experts requested since the last forecast
        rounds = min(max(FORECAST_PAGES // max(self._held.size, 1), N_ROUNDS[0]), N_ROUNDS[1])
        self._round = -(-self._n_rows // rounds)  # layers between forecasts
        self._row = -1
        self._look_ahead()

    def request(self, layer: int, experts: Sequence[int]) -> None:
        row = self._stats.row[layer]
        if self._only_count:
            self._row = row
            self._stats.request(layer, experts)
            return
        if row <= self._row:
            self._look_ahead()
            self._recall.next_token()
            self._turnover.next_token(self._n_held)
        self._row = row
        self._turnover.n_requests += len(experts)
        self._stats.request(layer, experts)
        self._waiting.append((row, list(experts)))
        begin = self._place[layer]
        if len(self._waiting) >= self._round and not self._held[[begin + expert for expert in experts]].all():
            self._look_ahead()  # somebody will have to give way
        else:
            self._pass_turn(row, list(experts))

    def _pass_turn(self, row: int, experts: list[int]) -> None:
        """Until the next forecast: the row comes round in a token's time, the pages used now stay."""
        begin = row * self._stats.n_experts
        distances = self._distance[begin : begin + self._stats.n_experts]
        distances += 1
        distances[experts] = 0
        least = self._line[0][0] if self._line else -1.0
        late = np.flatnonzero(self._held[begin : begin + self._stats.n_experts] & (distances > least))
        if len(late):
            self._line += zip(distances[late].tolist(), (late + begin).tolist(), strict=True)
            self._line.sort()

    def _look_ahead(self) -> None:
        """Learn from the layers that were requested, and forecast every page anew."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._forecast.learn([row for row, _ in waiting], [experts for _, experts in waiting])
        turn = np.arange(self._n_rows, dtype=np.float32) / max(self._n_rows, 1)
        turn[: self._row + 1] += 1
        distances = self._forecast.distances(self._turnover.patience) + turn[:, None]
        self._distance = distances.reshape(-1).astype(np.float32)
        self._line_up(LINE)

    def admit(self, page: Page) -> None:
        self._turnover.n_admitted += 1
        self._n_held += not self._held[self._place[page[0]] + page[1]]
        self._held[self._place[page[0]] + page[1]] = True

    def drop(self, page: Page) -> None:
        self._n_held -= int(self._held[self._place[page[0]] + page[1]])
        self._held[self._place[page[0]] + page[1]] = False

    def victims(self, n: int, keep: Collection[Page]) -> list[Page]:
        if self._only_count or len(self._waiting) >= self._round:
            self._only_count = False
            self._look_ahead()
        found = self._from_line(n, keep)
        if len(found) < n:
            self._line_up(n + len(keep) + LINE)
            found = self._from_line(n, keep)
        return found

    def _line_up(self, n: int) -> None:
        """Stand the n held pages with the greatest distances in line."""
        places = np.flatnonzero(self._held)
        distances = self._distance[places]
        if n < len(places):
            ahead = np.sort(np.argpartition(distances, -n)[-n:])
            places, distances = places[ahead], distances[ahead]
        order = np.argsort(distances, kind="stable")
        self._line = list(zip(distances[order].tolist(), places[order].tolist(), strict=True))

    def _from_line(self, n: int, keep: Collection[Page]) -> list[Page]:
        """The next n of the line that are still held, were not used meanwhile and may go."""
        found: list[Page] = []
        while self._line and not self._may_go(*self._line[-1]):
            self._line.pop()
        for distance, place in reversed(self._line):
            if len(found) == n:
                break
            row, expert = divmod(place, self._stats.n_experts)
            page = (self._stats.layers[row], expert)
            if page not in keep and self._may_go(distance, place):
                found.append(page)
        return found

    def _may_go(self, distance: float, place: int) -> bool:
        return bool(self._held[place]) and self._distance[place] == distance  # else used, or its turn passed


class Turnover:
    """How long a page survives here without being used, from how many are held and how many come in per token."""

    def __init__(self) -> None:
        self.n_requests = self.n_admitted = 0  # of the present token
        self._admitted_a_token = 0.0
        self._requests_a_token = 0.0
        self._seen = 0.0
        self._n_held = 0

    def next_token(self, n_held: int) -> None:
        self._seen = self._seen * 0.75 + 1
        self._admitted_a_token += (self.n_admitted - self._admitted_a_token) / self._seen
        self._requests_a_token += (self.n_requests - self._requests_a_token) / self._seen
        self._n_held = n_held
        self.n_requests = self.n_admitted = 0

    @property
    def patience(self) -> float:
        """In tokens."""
        return max(0.5, 0.5 * self._n_held / max(self._admitted_a_token, 0.02 * self._requests_a_token, 1e-9))


class Forecast:
    """Chances of every page, next turn and later, as mixtures that learn their weights by expectation maximisation."""

    def __init__(self, stats: RouterStats, recall: SimilarTokens) -> None:
        self._stats, self._recall = stats, recall
        self._n_tokens, self._last_row = 0, -1
        self._next_mix = np.full(_N_VIEWS, (1 - TRUST_IN_AGE) / (_N_VIEWS - 1), dtype=np.float32)
        self._next_mix[_AGED] = TRUST_IN_AGE
        self._later_mix = self._next_mix.copy()
        self._base_chance = 0.0  # of an expert nobody knows anything about
        self._ages = Recency(stats)
        # means, weights of like tokens and ages, some tokens ago
        self._snapshot: tuple[Array, Array, NDArray[np.intp]] | None = None
        self._reach = 3.0
        self._n_forecasts = 0
        self._later = np.zeros(
            (len(stats.layers), stats.n_experts), dtype=np.float32
        )  # what was recalled for later

    def learn(self, rows: Sequence[int], experts: Sequence[list[int]]) -> None:
        """These rows of the present token use these experts."""
        if rows[0] <= self._last_row:
            self._n_tokens += 1
            if self._n_tokens % SNAPSHOT_TOKENS == 0:
                later = self._recall.later_weights(self._reach)
                self._snapshot = (self._stats.use.copy(), later, self._ages.buckets())
        self._last_row = rows[-1]
        places = np.repeat(rows, [len(chosen) for chosen in experts])
        pages = np.concatenate(experts).astype(np.intp)
        who = self._recall.who(places, pages)
        if self._recall.n_past > 2:
            self._judge(places, pages, who, len(rows))
        self._stats.settle()
        for row, chosen in zip(rows, experts, strict=True):
            self._recall.learn(row, chosen)
        self._recall.compare(who)
        self._base_chance = len(pages) / len(rows) / self._stats.n_experts

    def _judge(self, rows: Places, pages: Places, who: Array, n_layers: int) -> None:
        """Move both mixtures towards the views that expected what is now used."""
        rate = 1 - (1 - LEARNING) ** n_layers
        asked, (soon, late) = np.unique(rows), self._ages.chances(self._base_chance)
        ages = self._ages.buckets(asked)
        aged = ages[np.searchsorted(asked, rows), pages]
        self._ages.learn(0, ages, aged)
        views = self._views(self._stats.use[:, rows, pages], self._recall.said(who), soon[aged])
        self._next_mix += rate * (_credit(self._next_mix, views) - self._next_mix)
        if self._snapshot is not None:
            means, weights, ages = self._snapshot
            aged = ages[rows, pages]
            self._ages.learn(1, ages[asked], aged)
            views = self._views(means[:, rows, pages], weights @ who.T, late[aged])
            self._later_mix += rate * (_credit(self._later_mix, views) - self._later_mix)

    def _views(self, means: Array, recalled: Array, aged: Array) -> Array:
        ignorance = np.full((1, means.shape[1]), self._base_chance, dtype=np.float32)
        return np.concatenate((means, recalled, aged[None], ignorance)) + np.float32(1e-6)

    def distances(self, patience: float) -> Array:
        """-patience * log of what each page's next use is worth, counted from its row's next turn [rows, experts]."""
        self._reach = max(1.5, patience)
        means, ages = self._stats.use.reshape(_N_MEANS, -1), self._ages.buckets()
        soon, late = self._ages.chances(self._base_chance)
        mixes = np.stack((self._next_mix, self._later_mix))
        first, later = (mixes[:, :_N_MEANS] @ means).reshape(2, *self._stats.use.shape[1:])
        first += self._recall.next_uses(self._next_mix[_RECALLED])
        first += (self._next_mix[_AGED] * soon + self._next_mix[_ALIKE] * self._base_chance)[ages]
        if self._n_forecasts % LATER_ROUNDS == 0:
            self._later = self._recall.later_uses(self._later_mix[_RECALLED], self._reach)
        self._n_forecasts += 1
        later += self._later
        later += (self._later_mix[_AGED] * late + self._later_mix[_ALIKE] * self._base_chance)[ages]
        np.clip(first, LEAST_CHANCE, 1, out=first)
        np.clip(later, LEAST_CHANCE, 1, out=later)
        return _distances(first, later, patience)


def _distances(first: Array, later: Array, patience: float) -> Array:
    """Of a page that is used at its next turn with chance `first`, then with chance `later` per token."""
    fade = np.float32(np.exp(-1 / patience))
    worth = first + (1 - first) * (fade * later / (1 - fade * (1 - later)))
    return np.asarray(-patience * np.log(worth), dtype=np.float32)


def _credit(mix: Array, views: Array) -> Array:
    """Each view's share in the mixture's forecasts of what came true [views]."""
    shares = mix[:, None] * views
    return np.asarray((shares / shares.sum(0)).mean(1), dtype=np.float32)
