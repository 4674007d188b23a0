"""Where the last tokens of a conversation were seen before, and what came then. Standard library only.

Every pair of neighbouring tokens is entered under its hash, each entry linked to the one before it of the same hash,
so that a token costs a constant: one entry, and a look at no more than `MAX_CANDIDATES` earlier places. The longest
match wins, the latest among equals; where no pair was seen before, the latest place of the last token alone will do
(a later token of the same hash hides it). A history grows up to `MAX_TOKENS` and then forgets its older half: 16 bytes
a token, and never more than 256 KiB, however long the conversation gets.

A predicted text stands between prompt and output. It is followed from its beginning; where the output leaves it, even
a single token that stands near that place brings the output back to it.
"""

from array import array
from collections.abc import Sequence as Items
from copy import copy

MIN_TOKENS, MAX_TOKENS = 1 << 7, 1 << 14
MAX_CANDIDATES = 16
MAX_MATCH = 32
MAX_PREDICTED = 1 << 14
"""Tokens that a predicted text may have; its history may then grow to four times as much, 1 MiB."""
GAP = -1
"""No token: stands before and behind a predicted text."""
NEAR_BEHIND, NEAR_AHEAD = 8, 32
_MIX = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class TokenHistory:
    """The last tokens of a conversation, and the place that goes on like the present one.

    Attributes:
        tokens: the last ones, at least `max_tokens` / 2 of a longer history.
        match_length: how many of the last tokens stand before the matching place too, counted up to `MAX_MATCH`;
            0: there is no match.
        is_predicted: the match is in the predicted text, and no chance hit of a single token.
    """

    def __init__(self, tokens: Items[int] = (), *, prediction: Items[int] = (), max_tokens: int = MAX_TOKENS) -> None:
        """
        Args:
            tokens: ids that fit in 31 bits; the last ones count.
            prediction: what may come next, up to `MAX_PREDICTED` tokens.
            max_tokens: tokens that are remembered at most, a power of two >= 4; more with a long prediction.
        """
        self._max_tokens = (
            max(16, max_tokens, 1 << (4 * len(prediction) - 1).bit_length()) if prediction else max_tokens
        )
        self._match = 0
        self.match_length = 0
        self.is_predicted = False
        self._predicted_begin = self._predicted_end = self._lost = 0
        if prediction:
            num_before = self._max_tokens // 2 - len(prediction) - 2
            self._rebuild((*tokens[-num_before:], GAP, *prediction, GAP))
            self._predicted_end = len(self.tokens) - 1
            self._predicted_begin = self._predicted_end - len(prediction)
            self._match = self._lost = self._predicted_begin
            self.match_length, self.is_predicted = 1, True
        else:
            self._rebuild(tokens[-self._max_tokens // 2 :])
            self._find()

    def copy(self) -> "TokenHistory":
        """Another one that knows the same; much faster than to build it again."""
        other = copy(self)
        other.tokens, other._latest = self.tokens[:], self._latest[:]
        other._latest_of_pair, other._earlier = self._latest_of_pair[:], self._earlier[:]
        return other

    @property
    def expected(self) -> int | None:
        """The token that comes next if the match goes on; None without a match."""
        return self.tokens[self._match] if self.match_length else None

    def push(self, token_id: int) -> None:
        """Takes the next token."""
        goes_on = token_id == self.expected
        if not goes_on and self.is_predicted and self.match_length > 1:
            self._lost = self._match
        self._append(token_id)
        if goes_on and self.match_length:
            self._match += 1
            self.match_length = min(self.match_length + 1, MAX_MATCH)
        if not (goes_on and self.match_length) or self.tokens[self._match] == GAP:
            self._find()

    def continuation(self, num_tokens: int) -> list[int]:
        """What comes next if the match goes on; one that reaches the end of the history is taken to repeat itself."""
        if not self.match_length:
            return []
        period = len(self.tokens) - self._match
        found = [self.tokens[self._match + number % period] for number in range(num_tokens)]
        return found[: found.index(GAP)] if GAP in found else found

    def _append(self, token_id: int) -> None:
        """Adds a token and enters the place that it takes; so no place is found before something stands there."""
        if len(self.tokens) == self._num_places:
            self._make_room()
        place, earlier = len(self.tokens), 0
        if place >= 1:
            self._latest[self._hash(self.tokens[-1])] = place
        if place >= 2:
            index = self._hash(self.tokens[-1] << 32 | self.tokens[-2])
            earlier, self._latest_of_pair[index] = self._latest_of_pair[index], place
        self._earlier.append(earlier)
        self.tokens.append(token_id)

    def _find(self) -> None:
        """Looks for the longest match of the last tokens."""
        tokens = self.tokens
        self._match = self.match_length = 0
        if len(tokens) < 2:
            return
        place = self._latest_of_pair[self._hash(tokens[-1] << 32 | tokens[-2])]
        for _ in range(MAX_CANDIDATES):
            length = self._length(place)
            if length > self.match_length and tokens[place] != GAP:
                self._match, self.match_length = place, length
            place = self._earlier[place]
            if place == 0:
                break
        if self.match_length == 0:
            place = self._latest[self._hash(tokens[-1])]
            if tokens[place] != GAP:
                self._match, self.match_length = place, self._length(place)
        self.is_predicted = self.match_length > 1 and self._predicted_begin <= self._match < self._predicted_end
        if self._predicted_end:
            self._find_near()

    def _find_near(self) -> None:
        """Takes a place in the predicted text near where it was left, if none elsewhere has a longer match."""
        begin = max(self._predicted_begin + 1, self._lost - NEAR_BEHIND)
        end = min(self._predicted_end, self._lost + NEAR_AHEAD)
        last = self.tokens[-1]
        places = [place for place in range(begin, end) if self.tokens[place - 1] == last]
        found = max(((self._length(place), -abs(place - 1 - self._lost), place) for place in places), default=None)
        if found is not None and found[0] >= self.match_length:
            self.match_length, _, self._match = found
            self.is_predicted = True

    def _length(self, place: int) -> int:
        """How many tokens before a place are the last ones."""
        tokens, end = self.tokens, len(self.tokens)
        most = min(MAX_MATCH, place)
        length = 0
        while length < most and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length

    def _hash(self, key: int) -> int:
        return (key * _MIX & _WORD) >> 32 & (self._num_places - 1)

    def _make_room(self) -> None:
        """Takes more memory, or drops the older half; a match that lies there goes with it."""
        dropped = 0 if self._num_places < self._max_tokens else self._max_tokens // 2
        self._rebuild(self.tokens[dropped:])
        self._match = max(0, self._match - dropped)
        self._predicted_end = max(0, self._predicted_end - dropped)
        self._predicted_begin, self._lost = max(0, self._predicted_begin - dropped), max(0, self._lost - dropped)
        if self._match == 0:
            self.match_length = 0
            self.is_predicted = False

    def _rebuild(self, tokens: Items[int]) -> None:
        """Enters these tokens into tables with room for as many again."""
        self._num_places = min(self._max_tokens, max(MIN_TOKENS, 1 << (2 * len(tokens) - 1).bit_length()))
        self.tokens = array("i")
        # A place is an index of `tokens`, that of the token that came next; 0 stands for none.
        self._latest = array("i", bytes(4 * self._num_places))  # by hash of one token: the place behind it
        self._latest_of_pair = array("i", bytes(4 * self._num_places))
        self._earlier = array("i")  # by place: the one before it behind a pair of the same hash
        for token_id in tokens:
            self._append(token_id)
