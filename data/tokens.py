"""Tokenize captions exactly as coco-caption's PTBTokenizer: lower case, without punctuation.

coco-caption runs Stanford's PTBTokenizer (Java, `-preserveLines -lowerCase`) and removes
PUNCTUATION from its output. PTBTokenizer and nltk's Treebank tokenizer both follow the Penn
Treebank, but they keep different tokens whole. Therefore this module first extracts the tokens that
Java keeps whole (`u.s.`, `1 1/2`, `well-lit`, `and/or`, `r&b`, `!!!`). Then Treebank splits the
other words (`do n't`, `can not`, `dog 's`). If several rules match, Java uses the longest match;
WHOLE is ordered so that its first match is the longest. data/characters.py contains Java's classes
of characters outside ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nltk.tokenize.treebank import TreebankWordTokenizer

from data.characters import DIGIT, DROPPED, LETTER, MARK, SPACE, classify

# The tokens that coco-caption removes. Its names of brackets are in upper case, so they never equal
# a lower-case token: brackets are kept.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
TREEBANK = TreebankWordTokenizer()
# Replaces an extracted token in Treebank's input: a private-use character, which Java removes from
# captions.
PLACEHOLDER = "\ue000"

# Java's output for punctuation, entities and currency signs.
SIGNS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    '"': "''",
    "…": "...",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": "''",
    "&mdash;": "--",
    "&ndash;": "--",
    "&nbsp;": "",
    "£": "#",
    "€": "$",
    "¤": "$",
    "₠": "$",
    "\x80": "$",
    "\x85": "...",
    "¢": "cents",
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    **dict.fromkeys(["---", "----", "–", "—", "―", "\x96", "\x97"], "--"),
}
LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\v\f\u2028\u2029", " "))
QUOTES = str.maketrans({
    "‘": "`", "’": "'", "“": "``", "”": "''", "«": "``", "»": "''", "‹": "`", "›": "'", "‛": "`",
    "\x91": "`", "\x92": "'", "\x93": "``", "\x94": "''",
})  # fmt: skip
PLAIN_QUOTES = str.maketrans("’\x92‘\x91‛", "''```")

# Abbreviations that keep their dot. ENDING: they may end a sentence (Java then looks past the next
# letter). TITLE: they do not end a sentence. CAPITAL: they begin with a capital. COUNTED: a number
# follows.
ENDING = """al|ala|apr|ariz|assn|aug|bancorp|bhd|bldg|blvd|bros|calif|colo?|conn|corp|cos?|ct|dak|dec|esq|est|etc|ext|
    feb|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kans?|ky|ltd|mar|md|mich|minn|mon?|mont|neb|nev|nov|oct|okla|penn|plc|
    pp?t[ey]s?|rd|rt|sept?|seq|sq|sr|sys|tel|tenn|thu|thurs|tues?|univ|va|vt|wed|wisc?|wyo"""
TITLE = """adj|adm|adv|alex|assoc|asst|attys?|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|drs?|elec|ens|ft|gen|
    govs?|hon|insp|invt|jos|lieut|lt|maj|messrs|mfg|mlle|mme|mrs?|ms|msgr|mtg?|natl|pfc|ph|pres|profs?|pvt|reps?|rev|
    sens?|sfc|sgt|spc|ste?|supts?|treas|vs|wm"""
CAPITAL = "ark|az|del|ill|la|mass|miss|ore|pa|tex|wash"
SUFFIXES = """bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|
    py|sql|tar|txt|wav|x|xml|zip"""  # of file names
COUNTED = "art|ca|figs?|nos?|op|pp|prop"
# A single letter keeps its dot (`plan b.`) unless one of these words begins a sentence after it.
OPENERS = r"""A|About|According|Additionally|After|An|As|At|But|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|
    One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You|M[rs]\."""

# The rules match the output of `classify`: LETTER represents every non-ASCII letter, MARK every
# combining mark, `“` every low or double quotation mark, and so on (data/characters.py).
B = rf"[a-z{LETTER}]"  # a letter
D = rf"[0-9{DIGIT}]"  # a digit
A = rf"[a-z{LETTER}0-9{DIGIT}]"  # between hyphens, where Java accepts no combining mark
L = rf"[a-z{LETTER}{MARK}\xad]"  # a letter of a word, including combining marks and soft hyphens
LD = rf"[a-z{LETTER}{MARK}\xad0-9{DIGIT}]"  # a later character of a word: L or a digit
S = rf"[\s\xa0{SPACE}]"  # a blank
Q = "['’`‘]"  # an apostrophe
ACRONYM = r"[a-z](?:\.[a-z])+"
# the ending of `it's`, `I'm`, `they're`; a plain quote may also begin a quoted word
STEM = "['’](?:[smd]|re|ve|ll)"
REST = rf"(?:{STEM}(?:(?<=’.)|(?<=’..)|(?![a-z])))"
ELISION = rf"(?:[dol]{Q}(?={A}{A}))?"
KEPT = r"(?:\.(?=[,;:、]))"  # a dot inside a sentence
NUMBER = rf"(?:{D}*(?:[.:,٫\xad]{D}+)+)"
NAME = r"[a-z][a-z0-9_:.-]*"
VALUE = rf"""(?:'[^']*'|"[^"]*"|{NAME})"""
MARKUP = rf"<(?:[!?][a-z-][^>]*|/?{NAME}(?:\ +{NAME}(?:\ *=\ *{VALUE})?)*\ */?)\ *>"
PHONE = r"""(?:\(\d{2,3}\)[\ \xa0]?|(?:\+\+?)?(?:\d{2,4}[-\ \xa0])?\d{2,4}[-\ \xa0])
    \d{3,4}[-\ \xa0]?\d{3,5}"""
URL = r"""[^\s"<>|()]+[^\s"<>|.!?(){},-]"""
# Java's range `,-_` excludes capitals, digits and hyphens from a host; non-ASCII characters are
# allowed.
HOST = rf"""(?!(?<={S})[\xa0{SPACE}])(?:
    (?-i:[^\s"`'$!?(){{}}|,-_]+\.)+(?:com|net|org|edu)
    | www\.(?:[^\s"<>|.!?(){{}},]+\.)+[a-z]{{2,4}})"""

WHOLE = rf"""
    https?://{URL} | {HOST}/{URL}                                                       # addresses
  | <?[a-z0-9][^\s\xa0"<>|(){{}}]*@(?:[^\s\xa0"<>|(){{}}.]+\.)*[^\s\xa0"<>|(){{}}.]+>?  # mail
  | {HOST}(?!{LD}|[.!?-]{L}|{KEPT})
  | @[a-z_]\w* | \#{L}+ | [cf]\# | c\+\+                                                # @name #tag C#
  | {MARKUP}
  | [<>]?[:;=](?-i:[-o*'])?(?:(?-i:[DPdpO])|[()\\{{@|\[\]])(?![a-z0-9])                 # :-)
  | [-^x=~<>']_[-^x=~<>'] | \([-^x=~<>'][_.]?[-^x=~<>']\)                               # ^_^
  | &\#\d+;
  | {D}{{1,4}}[-\ \xa0]{D}{{1,4}}[/⁄]{D}{{1,4}} | {D}{{1,4}}⁄{D}{{1,4}}                 # 1 1/2
  | {PHONE}
  | (?=[0-9/-]*{DIGIT})(?:{D}{{1,2}}[-/]{D}{{1,2}}[-/]{D}{{2,4}}|{D}{{1,4}}/{D}{{1,4}}) # ٣١/١٢/١٩٩٩
  | [a-z0-9]+(?:-[a-z]+){{0,2}}(?:\\?/[a-z0-9]+(?:-[a-z]+){{0,2}}){{1,2}}               # and/or
  | -[lr][rcs]b- | s&(?:amp;)?(?:p-500|ls) | cap['’]n | c['’]est                        # -lrb- s&p-500
  | (?-i:[A-Z]+(?:(?:&amp;|&AMP;|[+&])[A-Z]+)+){KEPT}? | (?-i:[A-Z]+\$)                 # R&B US$
  | (?=[a-z0-9-]+[.,\xad])[a-z0-9][a-z0-9.,\xad]*
    (?:-(?:{ACRONYM}\.|[a-z0-9\xad]+))+{KEPT}?                                          # 5,000-lb
  | cont'd\. | (?:dunkin|somethin|ol)(?!{STEM})['’]
  | nor'easter | c'mon | e'er | s'mores | ev'ry | li'l | nat'l | o'o
  | {ELISION}{A}+(?:[-_‐]{ELISION}{A}+)+{KEPT}? | [dol]{Q}{A}{{2,}}{KEPT}?              # well-lit o'clock
  | (?:pro|anti)- | {D}{LD}*(?:\.{LD}+)*\.(?:{SUFFIXES})(?!{LD})                        # anti- 12.jpg
  | (?-i:[A-HJ-XZn])(?!{REST}(?!{B})){Q}{B}{{2,}}                                       # O'Brien
  | [ldj](?!{STEM})['’] | y(?!{STEM})['’](?={B})                                        # y'all
  | {B}+[aeiouy](?!{REST}(?!{B})){Q}(?-i:[aeiouA-Z]){B}*                                # ma'am
  | {ACRONYM}\.(?!{L}) | (?:{TITLE})\.(?!{L})                                           # p.m. Dr.
  | (?:{ENDING}|(?=(?-i:[A-Z]))(?:{CAPITAL}))\.(?!{L}(?:{LD}|[.!?]{L}))                 # etc. Pa.
  | (?:{COUNTED})\.(?={S}?{D})                                                          # no. 5
  | [a-z]\.(?!{L}|{S}+(?:(?=(?-i:[A-Z]))(?:{OPENERS})|{MARKUP})(?:{S}|$))               # plan b.
  | {L}{LD}*(?:[.!?]{L}{LD}*)+{KEPT}? | (?:{L}{LD}*|{A}+){KEPT}                         # foo.bar
  | {NUMBER}(?![.:,٫\xad]?{LD}) | {L}+{D}{LD}* | {NUMBER}                               # 5:54 a4
  | (?<!-)[-+](?:{NUMBER}|{D}+) | {D}+{A}* | ⁺?(?:²+|₂+)                                # -5 10am ²³
  | ['’](?:till?|em|cause|[2-9]0s|\d\d(?={S}|$)) | 'n(?:['’]|(?=[\s\xa0]|$)) | ’n['’]?  # 'em '80s 'n'
  | 't(?=is|was) | {HOST}
"""
WORD = rf"""[a-z\xad]*?[a-mo-z]\xad*(?:n['’]t(?!{B})|(?=n{Q}t)) | n{Q}t(?!{B})
  | (?:d'ye|more'n)(?!{L}) | (?P<stem>{L}*){REST} | {L}+"""
SIGN = rf"""[`‘’“]{{1,2}} | '' | -{{2,}} | \.{{3,}} | [?!]{{2,}} | (?:\\\*)+ | \*+ | @+ | \#+ | _+
  | << | >> | &(?:amp|lt|gt|quot|mdash|ndash|nbsp); | [^\s\xa0{SPACE}]"""
# ASCII: in Java, `İ`, `ı`, `ſ` and `K` are not in [a-z].
FLAGS = re.VERBOSE | re.IGNORECASE | re.ASCII
# A run of letters before a blank is always a word. It is tried first, as most tokens match it.
SCAN = re.compile(
    rf"(?P<alone>{L}+)(?=[\ \t]|$) | (?P<whole>{WHOLE}) | (?P<word>{WORD}) | {SIGN}", FLAGS
)
UNKNOWN = frozenset([DROPPED, "‐", "٫"])  # Java removes these if they are separate tokens

# The fast path. PLAIN matches nine of ten captions and questions: letters, spaces, commas and one
# final full stop or question mark. NEARLY matches most others: words of two or more letters may be
# joined by hyphens or end with `'s`.
# Treebank's contractions and a last word that keeps its dot take the slow path.
PLAIN = re.compile(r"([A-Za-z,\s]*)([.?]?)\s*")
NEARLY = re.compile(
    r"((?:[A-Za-z]{2,}(?:(?:-[A-Za-z]{2,})+|'s)?(?![^\s,.?])|[A-Za-z](?![^\s,.?])|,(?!\S)|\s)*)([.?]?)\s*"
)
SPLIT = frozenset(["cannot", "gimme", "gonna", "gotta", "lemme", "wanna"])
KEEPS_DOT = re.compile(rf"{ENDING}|{TITLE}|{CAPITAL}|[a-z]", re.VERBOSE)


def tokenize(caption: str) -> list[str]:
    """Return the tokens of a caption."""
    if match := PLAIN.fullmatch(caption):
        words = match[1].lower().replace(",", " ").split()
    elif match := NEARLY.fullmatch(caption):
        words = match[1].lower().replace(",", " ").replace("'s", " 's").split()
    if not match or not words or not SPLIT.isdisjoint(words):
        return _tokenize_any(caption)
    if match[2] == "." and KEEPS_DOT.fullmatch(words[-1]):
        return _tokenize_any(caption)
    return words


def tokenize_all(captions: Iterable[str]) -> list[list[str]]:
    """Return the tokens of each caption, in order."""
    return [tokenize(caption) for caption in captions]


def _tokenize_any(caption: str) -> list[str]:
    """Return the tokens of any caption; about 60 times slower than the fast path."""
    caption = caption.translate(LINE_ENDS).replace("&apos;", "'")
    extracted: list[str] = []

    def replace(match: re.Match[str]) -> str:
        token = caption[match.start() : match.end()]
        if (match["alone"] or match["word"]) is not None:
            return split(token, match["stem"])
        if match["whole"] is not None:
            token = token.replace(" ", "\xa0").replace("&amp;", "&")
            if not token.endswith(">"):  # brackets in mark-up are kept, those of :-) are not
                token = token.replace("(", SIGNS["("]).replace(")", SIGNS[")"])
            if token[0] not in "<#" and "/" not in token and "@" not in token:  # a word or a number
                token = token.replace("\xad", "")
        elif match[0] in UNKNOWN:  # match[0]: the output of `classify`; token: the caption's text
            return " "
        else:
            token = SIGNS.get(token, token).translate(QUOTES)
        return extract(token)

    def split(word: str, stem: str | None) -> str:
        """Leave English words to Treebank. Other words are only split from `'s` (`café's`)."""
        plain = word.replace("\xad", "").translate(PLAIN_QUOTES)
        if stem:
            stem, _, ending = plain.rpartition("'")
            return f"{extract(stem)} '{ending.lower()} "
        if plain.isascii() and ("\xad" not in word or plain.lower().endswith("n't")):
            return f" {plain.lower()} "
        return extract(plain)

    def extract(token: str) -> str:
        if not token or token in PUNCTUATION or not token.strip("."):
            return " "
        extracted.append(_lower(token))
        return f" {PLACEHOLDER} "

    text = SCAN.sub(replace, classify(caption))
    tokens = iter(extracted)
    return [
        next(tokens) if word == PLACEHOLDER else word
        for word in TREEBANK.tokenize(text)
        if word not in PUNCTUATION
    ]


def _lower(token: str) -> str:
    """Lower case as in Java, whose rule for the final sigma (`ΟΔΟΣ-ΕΡΜΟΥ`) differs from Python's."""
    if "Σ" not in token:
        return token.lower()

    def small_sigma(match: re.Match[str]) -> str:
        before, after = match.string[: match.start()], match.string[match.end() :]
        return "ς" if _has_case(before) and not _has_case(after) else "σ"

    return "".join(
        re.sub("Σ", small_sigma, part).lower() for part in re.split("([!?@/:&+=])", token)
    )


def _has_case(text: str) -> bool:
    return text.lower() != text.upper()
