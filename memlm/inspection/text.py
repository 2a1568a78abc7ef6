"""What ``memlm inspect`` prints: tables that fit a terminal."""

from collections.abc import Sequence

from memlm.inspection.ablation import AblationReport
from memlm.inspection.corpus import Context, SlotReport
from memlm.inspection.reads import LayerReads, MemoryBlock
from memlm.tokenizers import Tokenizer

_LONGEST_LABEL = 16


def token_label(tokenizer: Tokenizer, token: int) -> str:
    """A token on one line: its text with white space shown; ``<eos>``; ``#id`` for one without text."""
    if token == tokenizer.eos_id:
        return "<eos>"
    return visible(tokenizer.decode([token])) or f"#{token}"


def visible(text: str) -> str:
    """A text on one line, control characters written as escapes."""
    return "".join(c if c == " " or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reads_text(layers: list[LayerReads], labels: list[str], top: int, last: int | None, width: int) -> str:
    """What a prompt reads: an overview of all heads, then the heaviest slots of each.

    Args:
        layers: What the tokens read.
        labels: Of the tokens.
        top: Most slots shown of a head.
        last: Show the slots of so many last tokens only; None: of all.
        width: Columns of the terminal.
    """
    first = 0 if last is None else max(len(labels) - last, 0)
    sections = [_overview(layers, labels, width)]
    sections += [_details(layer, labels, first, top, width) for layer in layers]
    return "\n\n".join(sections)


def _overview(layers: list[LayerReads], labels: list[str], width: int) -> str:
    """Effective number of slots, or Engram's gate: a line a token, a column a head (Engram: a layer)."""
    engram = layers[0].place.by_ngrams
    title = (
        "Gate of each token: how much of its rows each layer adds"
        if engram
        else "Effective number of slots that each head reads: exp of the weights' entropy"
    )
    lines = _wrapped(title, width)
    columns: list[tuple[str, list[str]]] = []
    for layer in layers:
        shown = (layer.concentration if engram else layer.effective).float().cpu()
        # All tables of an Engram layer have one gate.
        for head, name in list(enumerate(layer.place.short_heads))[: 1 if engram else None]:
            title = f"b{layer.place.block}" if engram else f"b{layer.place.block}.{name}"
            columns.append((title, [f"{value:.2f}" for value in shown[:, head].tolist()]))
    left = max(5, *(min(len(label), _LONGEST_LABEL) for label in labels))
    numbers = len(str(len(labels) - 1))
    each = max(6, *(len(text) for title, cells in columns for text in (title, *cells)))
    at_once = max((width - left - numbers - 1) // (each + 1), 1)
    for start in range(0, len(columns), at_once):
        part = columns[start : start + at_once]
        if start:
            lines.append("")
        lines.append(" " * (numbers + 1 + left) + "".join(f" {title:>{each}}" for title, _ in part))
        for place, label in enumerate(labels):
            cells = "".join(f" {cells[place]:>{each}}" for _, cells in part)
            lines.append(f"{place:>{numbers}} {_cut(label):<{left}}{cells}")
    return "\n".join(lines)


def _details(layer: LayerReads, labels: list[str], first: int, top: int, width: int) -> str:
    place, (_, heads, reads) = layer.place, layer.slots.shape
    expanded = place.virtual_tables > 1
    engram = place.by_ngrams
    what = f"{heads} tables" if engram else f"{heads} heads of {reads} reads"
    form = "row" + ("@virtual table" if expanded else "") + (":gate" if engram else ":weight")
    form += "*activation" if layer.activations is not None else ""
    title = f"Block {place.block}, pool {place.pool} ({place.slots:,} slots): {what}; {form}, heaviest first"
    lines = _wrapped(title, width)
    head_width = max(map(len, place.short_heads))
    rows, tables = layer.rows.tolist(), layer.tables.tolist()
    weights = layer.weights.float().cpu()
    order = layer.factors.abs().argsort(-1, descending=True).tolist()
    numbers, left = len(str(len(labels) - 1)), max(min(len(label), _LONGEST_LABEL) for label in labels)
    for token in range(first, len(labels)):
        if engram:
            gate = f"{float(weights[token, 0, 0]):.3f}"
            cells = [f"{name} {rows[token][h][0]}:{gate}" for h, name in enumerate(place.short_heads)]
            start = f"{token:>{numbers}} {_cut(labels[token]):<{left}} "
            lines.append(_fitted(start, cells, width))
            continue
        for head, name in enumerate(place.short_heads):
            cells = []
            for read in order[token][head][:top]:
                cell = str(rows[token][head][read])
                cell += f"@{tables[token][head][read]}" if expanded else ""
                cell += f":{float(weights[token, head, read]):.2f}"
                if layer.activations is not None:
                    cell += f"*{float(layer.activations[token, head, read]):+.2f}"
                cells.append(cell)
            label = f"{token:>{numbers}} {_cut(labels[token]):<{left}}" if head == 0 else ""
            lines.append(_fitted(f"{label:<{numbers + 1 + left}} {name:<{head_width}} ", cells, width))
    return "\n".join(lines)


def slots_text(
    reports: list[SlotReport], places: Sequence[MemoryBlock], tokenizer: Tokenizer, width: int
) -> str:
    """What slots answer to: counts, contexts, and the next tokens that they push.

    Args:
        reports: Of the slots.
        places: The model's memory layers.
        tokenizer: The model's.
        width: Columns of the terminal.
    """
    heads = {place.block: place.short_heads for place in places}
    expanded = any(place.virtual_tables > 1 for place in places)
    return "\n\n".join(_slot_text(report, heads, expanded, tokenizer, width) for report in reports)


def _slot_text(
    report: SlotReport, heads: dict[int, tuple[str, ...]], expanded: bool, tokenizer: Tokenizer, width: int
) -> str:
    share = report.readers / max(report.tokens, 1)
    title = f"Slot {report.slot.row} of pool {report.slot.pool}: read by {report.readers:,} of "
    lines = [title + f"{report.tokens:,} tokens ({share:.2%}), summed weight {report.weight:.3f}"]
    if report.reads:
        by_count = sorted(report.reads.items(), key=lambda item: -item[1])
        counts = [f"b{block}.{heads[block][head]} {count:,}" for (block, head), count in by_count]
        lines.append(_fitted("  reads: ", counts, width))
        lines.append("  weight  where    document  context, [the token] in brackets")
    for found in report.contexts:
        where = f"b{found.block}.{heads[found.block][found.head]}"
        start = f"  {found.weight:6.3f}  {where:<8} {found.document:8}  "
        lines.append(start + surroundings(found, tokenizer, max(width - len(start), 24)))
    for push in report.pushes:
        where = f"b{push.block}" + (f" table {push.table}" if expanded else "")
        tokens = [f"{token_label(tokenizer, token)!r} {score:+.1f}" for token, score in push.tokens]
        how = "" if push.in_corpus else ", gate taken as open"
        lines.append(_fitted(f"  pushes ({where}{how}): ", tokens or ["nothing"], width))
    return "\n".join(lines)


def surroundings(found: Context, tokenizer: Tokenizer, width: int) -> str:
    """A token in brackets, with as much of the text around it as fits."""
    at = found.position
    before = tokenizer.decode(found.tokens[:at])
    upto = tokenizer.decode(found.tokens[: at + 1])
    whole = tokenizer.decode(found.tokens)
    if found.tokens[at] == tokenizer.eos_id or not (upto.startswith(before) and whole.startswith(upto)):
        # The text of a part need not begin that of the whole, as where a token is half a character.
        token, after = token_label(tokenizer, found.tokens[at]), tokenizer.decode(found.tokens[at + 1 :])
    else:
        token, after = upto[len(before) :], whole[len(upto) :]
    before, token, after = visible(before), visible(token), visible(after)
    room = max(width - len(token) - 2, 0)
    right = min(len(after), max(room // 3, room - len(before)))
    left = room - right
    if len(before) > left:
        before = "…" + before[len(before) - left + 1 :] if left > 0 else ""
    if len(after) > right:
        after = after[: right - 1] + "…" if right > 0 else ""
    return f"{before}[{token}]{after}"


def ablation_names(report: AblationReport) -> list[str]:
    """What each ablation removes, in a few words."""
    names = []
    for ablation in report.ablations:
        if ablation.kind == "layer":
            names.append(f"block {ablation.block}, all heads")
        elif ablation.kind == "head":
            names.append(f"block {ablation.block}, {ablation.head_name}")
        elif ablation.slot is not None:
            (pool, row), weight = ablation.slot
            names.append(f"slot {row} of {pool} (weight {weight:.2f})")
        else:
            names.append("these slots together")
    return names


def ablation_text(report: AblationReport, answer_labels: list[str]) -> str:
    """The answer's log-likelihood under every removal, beside that of its controls.

    Args:
        report: What was removed.
        answer_labels: The answer's tokens.
    """
    intact = report.intact
    tokens = " ".join(f"[{label}]" for label in answer_labels)
    noun = "token" if intact.tokens == 1 else "tokens"
    lines = [
        f"Answer {tokens}, {intact.tokens} {noun}: log-likelihood {intact.log_likelihood:.4f} nats, "
        + ("each the likeliest token" if intact.greedy else "not what the model would write"),
        "Change of it in nats when slots are removed; controls: the same number of others, mean of "
        f"{_draws(report)} draws",
        "",
    ]
    table = [["removed", "slots", "log-lik.", "change", "greedy", "random", "also read"]]
    for ablation, name in zip(report.ablations, ablation_names(report), strict=True):
        controls = {control.what: control for control in ablation.controls}
        cells = []
        for what in ("random", "also read"):
            control = controls.get(what)
            cell = "" if control is None else f"{control.mean - intact.log_likelihood:+.4f}"
            if control is not None and control.slots != ablation.slots:
                cell += f" ({control.slots})"
            cells.append(cell)
        found = ablation.scored
        change = f"{found.log_likelihood - intact.log_likelihood:+.4f}"
        table.append(
            [
                name,
                f"{ablation.slots:,}",
                f"{found.log_likelihood:.4f}",
                change,
                "yes" if found.greedy else "no",
                *cells,
            ]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in table
    ]
    lines += [shown[0], "-" * len(shown[0])]
    lines += shown[1:]
    return "\n".join(lines)


def _draws(report: AblationReport) -> int:
    counts = [len(control.log_likelihoods) for found in report.ablations for control in found.controls]
    return max(counts, default=0)


def _cut(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _fitted(start: str, cells: list[str], width: int) -> str:
    """As many cells as fit a line, at least one."""
    line = start + cells[0] if cells else start.rstrip()
    for place, cell in enumerate(cells[1:], 1):
        more = len(cells) - place
        if len(line) + 2 + len(cell) + (len(f"  +{more}") if more > 1 else 0) > width:
            return f"{line}  +{more}"
        line += f"  {cell}"
    return line


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines
