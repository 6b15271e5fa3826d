"""One spelling for the many ways in which people and models write the same mathematics.

`spelled` rewrites an expression as plain LaTeX that math-verify reads: Unicode signs, sizes of
brackets, fonts, money, thousands, exponents of computers, mixed and repeating decimals. `key` is
that without white space and case of words: equal keys are equal answers. Nothing here evaluates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from actors.verifiers.braces import is_group

_SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n", strict=True))
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SIGNS = {
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "∗": "*",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "∞": r"\infty ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "π": r"\pi ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "σ": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "ε": r"\epsilon ",
    "ρ": r"\rho ",
    "τ": r"\tau ",
    "Δ": r"\Delta ",
    "−": "-",
    "–": "-",
    "—": "-",
    "‐": "-",
    "‑": "-",
    "﹣": "-",
    "⁄": "/",
    "∕": "/",
    "′": "'",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "…": r"\ldots ",
    "⋯": r"\ldots ",
    "°": r"^{\circ}",
    "º": r"^{\circ}",
    "℃": r"^{\circ}C",
    "℉": r"^{\circ}F",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∜": r"\sqrt[4] ",
    "∠": r"\angle ",
    "→": r"\to ",
    "、": ",",
    "，": ",",
    "。": ".",
    "：": ":",
    "；": ";",
    "（": "(",
    "）": ")",
    "％": "%",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "∣": "|",
    "∖": r"\setminus ",
}
_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|rm|bf"
    r"|operatorname\*?|boldsymbol|bm)\s*\{([^{}]*)\}"
)
_SPACE = re.compile(r"(?<!\\)\\(?:[,;:!> ]|quad\b|qquad\b|hspace\{[^{}]*\}|thinspace\b)|~")
_SIZE = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg|displaystyle|textstyle"
    r"|limits|nolimits|mathopen|mathclose)(?![A-Za-z])\.?"
)
_WRAPPER = re.compile(r"\$\$?|(?<!\\)\\[()\[\]](?!\d*(?:ex|pt|em)\])")
_ROUND_NUMBER = re.compile(r"(?<![\w,.^{])(\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+))(?! ?\d|,\d)")

_Rewrite = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _repeating(found: re.Match[str]) -> str:
    """`0.1\\overline{6}` as a fraction."""
    whole, fixed, period = found[1], found[2], found[3]
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed or "0"), scale)
    value += Fraction(int(period), scale * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_REWRITES: tuple[_Rewrite, ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:boxed|fbox|ensuremath)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![A-Za-z]))", r"\\ln "),
        (r"\(\s*\\?[pb]?mod(?![A-Za-z])\s*\{?\s*(\w+)\s*\}?\s*\)", r" \\mod \1"),
        (r"\\[pb]?mod(?![A-Za-z])\s*\{?\s*(\w+)\s*\}?", r" \\mod \1"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),  # \frac12
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\[\d+\])?\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))", r"\\sqrt\1{\2}"),
        (r"\\sqrt\s*(\[\d+\])?\s*\(([^()]*)\)", r"\\sqrt\1{\2}"),
        (r"\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(pi|infty|infinity)(?![A-Za-z])", r"\\\1 "),
        (r"\\infinity", r"\\infty"),
        (r"(?<![\\A-Za-z])oo(?![A-Za-z])", r"\\infty "),
        (r"\\(?:geqslant|geqq|geq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:leqslant|leqq|leq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:dots|cdots|dotsc|dotsb|vdots)(?![A-Za-z])|\.\.\.+", r"\\ldots "),
        (r"\\(?:colon)(?![A-Za-z])", ":"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
        (r"\\degrees?(?![A-Za-z])|\^\s*\\circ(?![A-Za-z])", r"^{\\circ}"),
        (r"(?<=\d)\s*degrees?\b", r"^{\\circ}"),
        (r"\^\{\\circ\}(?!\s*[CF]\b)", ""),
        (r"\\%", "%"),
        (r"\\_", "_"),
        (r"(?<=\d)\{,\}(?=\d{3})", ","),
        (r"(?<![\w.\\^{])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times "),
        (r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),  # 2 1/2
        (r"(?<![\d./])(\d+)\s+(?=\\frac\{\d+\}\{\d+\})", r"\1"),
        (r"(?<![\d.])(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating),
        (r"(?<![\d.])(\d*)\.(\d*)\\dot\{(\d)\}", _repeating),
        (r"(?i)\b([ap])\.\s?m\b\.?", r"\1m"),
        (r"(?<!\d)\.(?=\d)", "0."),
    )
)
_DECORATION = " \t\n\r*`\"'"
_MINUS_SPACES = re.compile(r"(?<=\d)(?:\\[,!;: ]|,\\!|\\,)+,?(?=\d{3}(?!\d))")
_MONEY = re.compile(r"\\?[$£€¥]\s*(?=[-\d.])|\\\$|(?<=\d)\s*[£€¥]")
_VULGAR = re.compile(r"[\N{VULGAR FRACTION ONE QUARTER}-\N{VULGAR FRACTION THREE QUARTERS}⅐-⅞]")


def spelled(expression: str) -> str:
    """`expression` as plain LaTeX without what does not matter, white space of words kept."""
    text = _of_unicode(expression)
    text = _MINUS_SPACES.sub("", text)
    text = _MONEY.sub("", text)
    text = _SPACE.sub(" ", _SIZE.sub("", text))
    text = _WRAPPER.sub("", text) if not _is_array(text) else text.replace("$", "")
    while (plain := _FONT.sub(r" \1 ", text)) != text:
        text = plain
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    return _undecorated(text)


def without_thousands(expression: str) -> str:
    """`1,234` and `1 234` as `1234`; inside brackets such a comma parts a list."""
    return _ROUND_NUMBER.sub(lambda found: re.sub(r"[ ,]", "", found[1]), expression)


def key(expression: str) -> str:
    """What equal spellings of one answer share, of an expression that is `spelled`."""
    text = re.sub(r"\\([A-Za-z]+)\s+(?=[A-Za-z])", r"\\\1 ", expression)
    text = re.sub(r"\\([A-Za-z]+)\s+(?![A-Za-z\s])", r"\\\1", text)
    text = re.sub(r"(?<=[^\w\s])\s+|\s+(?=[^\w\s])", "", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    return re.sub(r"(?<![\\A-Za-z])[A-Za-z]{2,}", lambda word: word[0].lower(), text)


def _of_unicode(text: str) -> str:
    text = _VULGAR.sub(lambda sign: _vulgar(sign[0]), text)
    text = re.sub(f"[{''.join(map(re.escape, _SUPER))}]+", lambda run: _raised(run[0]), text)
    text = re.sub(f"[{''.join(_SUB)}]+", lambda run: f"_{{{run[0].translate(_SUB_TABLE)}}}", text)
    text = text.translate(_SIGN_TABLE)
    return unicodedata.normalize("NFKC", text)


_SIGN_TABLE = str.maketrans(_SIGNS)
_SUPER_TABLE, _SUB_TABLE = str.maketrans(_SUPER), str.maketrans(_SUB)


def _raised(run: str) -> str:
    return f"^{{{run.translate(_SUPER_TABLE)}}}"


def _vulgar(sign: str) -> str:
    value = Fraction(unicodedata.numeric(sign)).limit_denominator(10)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _is_array(text: str) -> bool:
    return r"\begin" in text


def _undecorated(text: str) -> str:
    """`text` without marks of emphasis, quotation and the end of a sentence around it."""
    while True:
        plain = text.strip(_DECORATION).rstrip(".,;:").removesuffix("\\").strip(_DECORATION)
        if len(plain) > 2 and is_group(plain):
            plain = plain[1:-1]
        if plain == text:
            return text
        text = plain
