"""Text from a model: one token at a time, drawn from the distribution sharpened by a temperature and cut to its
nucleus (Holtzman et al. 2019, arXiv:1904.09751), for many prompts at once. Keys and values of what was read are kept,
so that a token costs one position. Each prompt has a seed, which fixes its draws whatever the others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.train_tokenizer.tokenizer import end_of, end_of_text, load_tokenizer
from data_pipeline.train_tokenizer.tokenizer import vocab_size as size_of
from llm.kernels.attention import Attend, Documents
from llm.model.layouts import load_folder, read_config
from llm.model.transformer import Transformer

UNFINISHED = "\ufffd"
"""Character that a decoder puts for bytes that are no character, or the beginning of one."""

NextLogits = Callable[[Mapping[int, Sequence[int]]], dict[int, Tensor]]
"""Sequences by their numbers -> logits ``(V,)``, on the CPU, of what follows each: in place of a model that is spread
over ranks."""


def generate(
    model: Transformer | NextLogits,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seeds: Sequence[int],
) -> list[str]:
    """Return the continuation of each prompt (not itself included), up to the end of text or ``max_new_tokens``.

    The prompts stand at the start of a document, as in training. Temperature 0 takes the likeliest token.
    """
    if not prompts:
        return []
    end = end_of_text(tokenizer)
    sequences = [[end, *encoding.ids] for encoding in tokenizer.encode_batch(list(prompts))]
    new = draw(
        model,
        sequences,
        most=max_new_tokens,
        end=end,
        temperature=temperature,
        top_p=top_p,
        seeds=seeds,
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    """Return the continuation that `generate` gives in chunks, as it is drawn; chunks end with whole characters."""
    end = end_of_text(tokenizer)
    drawn = draws(
        model,
        [[end, *tokenizer.encode(prompt).ids]],
        most=max_new_tokens,
        end=end,
        temperature=temperature,
        top_p=top_p,
        seeds=[seed],
    )
    return whole_characters((token for _, token in drawn), tokenizer)


def whole_characters(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of tokens as they come, in chunks that end with whole characters."""
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        chunk = tokenizer.decode(pending, skip_special_tokens=True)
        if not chunk.endswith(UNFINISHED):
            pending.clear()
            yield chunk
    if pending:
        yield tokenizer.decode(pending, skip_special_tokens=True)


def open_folder(folder: Path) -> tuple[Transformer, Tokenizer]:
    """Load the model and the tokenizer of an exported folder.

    Raises:
        UserError: it holds none, or one that llmill did not export.
    """

    vocab_size = read_config(folder).vocab_size
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: name a folder that llmill exported")
    tokenizer = load_tokenizer(folder)
    if tokenizer.token_to_id(end_of(tokenizer)) is None or size_of(tokenizer) > vocab_size:
        raise UserError(
            f"{folder} holds a model that llmill did not export: its tokenizer has no {end_of(tokenizer)}, or more "
            f"entries than the model ({vocab_size});\nuse it with transformers"
        )
    return load_folder(folder), tokenizer


def generate_from_folder(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """`generate` for one prompt with the model and the tokenizer of an exported folder."""
    return generate(
        *open_folder(folder),
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seeds=[seed],
    )[0]


def draw(
    model: Transformer | NextLogits,
    sequences: Sequence[Sequence[int]],
    *,
    most: int,
    end: int | None,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
) -> list[list[int]]:
    """At most ``most`` tokens after each of ``sequences``, less where ``end`` is drawn, which is left out."""
    new: list[list[int]] = [[] for _ in sequences]
    for row, token in draws(
        model, sequences, most=most, end=end, temperature=temperature, top_p=top_p, seeds=seeds
    ):
        new[row].append(token)
    return new


@torch.inference_mode()
def draws(
    model: Transformer | NextLogits,
    sequences: Sequence[Sequence[int]],
    *,
    most: int,
    end: int | None,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
) -> Iterator[tuple[int, int]]:
    """Yield the tokens of `draw` as they are drawn, each with the number of its sequence.

    The model sees the last ``context`` tokens of a sequence. When it has more, positions shift with every token, so
    nothing that was kept holds any longer, and the window is read anew for each.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens = [list(sequence) for sequence in sequences]
    next_logits = model
    if isinstance(model, Transformer):
        next_logits = Reader(model, longest=max(map(len, tokens)) + most).next_logits
    open_rows = list(range(len(tokens)))
    for _ in range(most):
        logits = next_logits({row: tokens[row] for row in open_rows})
        for row, logits_V in logits.items():
            token = pick(logits_V, temperature, top_p, generators[row])
            if token == end:
                open_rows.remove(row)
            else:
                tokens[row].append(token)
                yield row, token
        if not open_rows:
            break


class Reader:
    """Reads sequences that grow at their ends, keeping what it has read of those that still fit the context."""

    def __init__(self, model: Transformer, longest: int) -> None:
        self.model = model
        self.room = min(model.config.context, longest)
        self.rows: list[int] = []
        self.cache: Cache | None = None

    def next_logits(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Return logits ``(V,)``, on the CPU, of what follows each sequence; since last time each has got one token
        more."""
        context = self.model.config.context
        short = [row for row, tokens in sequences.items() if len(tokens) <= context]
        logits = self.follow(short, sequences) if short else {}
        if slid := [row for row, tokens in sequences.items() if len(tokens) > context]:
            windows = [sequences[row][-context:] for row in slid]
            logits |= dict(zip(slid, Cache(self.model, len(slid), context).read(windows), strict=True))
        return logits

    def follow(self, rows: list[int], sequences: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Return the same for sequences within the context: all of them the first time, then their last tokens."""
        if self.cache is None:
            self.cache = Cache(self.model, len(rows), self.room)
            unread = [sequences[row] for row in rows]
        else:
            if rows != self.rows:
                self.cache.keep([self.rows.index(row) for row in rows])
            unread = [sequences[row][-1:] for row in rows]
        self.rows = rows
        return dict(zip(rows, self.cache.read(unread), strict=True))


class Cache:
    """Keys and values of the positions that a batch of sequences has, layer by layer."""

    def __init__(self, model: Transformer, rows: int, room: int) -> None:
        """Room for ``room`` tokens of each of ``rows`` sequences."""
        config, weight = model.config, model.embed_tokens.weight
        shape = (rows, room, config.kv_head_count, config.head_width)
        self.model = model
        self.keys = [torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in model.layers]
        self.values = [torch.zeros_like(key) for key in self.keys]
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=weight.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all other rows."""
        index = torch.tensor(rows, device=self.lengths_B.device)
        self.keys, self.values = [x[index] for x in self.keys], [x[index] for x in self.values]
        self.lengths_B = self.lengths_B[index]

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Return logits ``(B, V)``, on the CPU, of what follows when ``tokens`` are appended to each row.

        Shorter rows are filled up behind, where none of theirs looks and where their next tokens will be written.
        """
        device = self.lengths_B.device
        counts_B = torch.tensor([len(row) for row in tokens], device=device)
        longest = int(counts_B.max())
        padded_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=device)
        positions_BT = self.lengths_B[:, None] + torch.arange(longest, device=device)
        seen = torch.arange(int(positions_BT.max()) + 1, device=device)
        mask_B1TS = (seen <= positions_BT[..., None])[:, None]
        x_BTD, rope = self.model.embed(padded_BT, positions_BT)
        for number, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, rope, self.attend(number, positions_BT, mask_B1TS), None)
        self.lengths_B = self.lengths_B + counts_B
        last_BD = x_BTD[torch.arange(len(tokens), device=device), counts_B - 1]
        return self.model.lm_head(self.model.norm(last_BD)).cpu()

    def attend(self, layer: int, positions_BT: Tensor, mask_B1TS: Tensor) -> Attend:
        """Attention of new positions to all that the layer has read so far, after the new ones are kept."""
        rows_B1 = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]
        seen = mask_B1TS.shape[-1]

        def attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, _: Documents | None) -> Tensor:
            keys_BSKE, values_BSKE = self.keys[layer], self.values[layer]
            keys_BSKE[rows_B1, positions_BT], values_BSKE[rows_B1, positions_BT] = k_BTKE, v_BTKE
            mixed_BHTE = F.scaled_dot_product_attention(
                q_BTHE.transpose(1, 2),
                keys_BSKE[:, :seen].transpose(1, 2),
                values_BSKE[:, :seen].transpose(1, 2),
                attn_mask=mask_B1TS,
                enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
            )
            return mixed_BHTE.transpose(1, 2)

        return attend


def pick(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id: the likeliest at temperature 0, else a draw from the nucleus of mass ``top_p``.

    Logits count from the highest one, so that no temperature is too low to divide by.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    below_V = logits_V.double() - logits_V.max()
    return int(torch.multinomial(nucleus(below_V / temperature, top_p), 1, generator=generator))


def nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Return probabilities of the fewest likeliest tokens that together have at least ``top_p``; all others are 0."""
    sorted_V, order_V = logits_V.double().softmax(dim=-1).sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(dim=-1) - sorted_V
    kept_V = sorted_V.masked_fill(before_V >= top_p, 0.0)
    return torch.zeros_like(kept_V).scatter_(0, order_V, kept_V / kept_V.sum())
