"""The words of a caption, exactly as coco-caption's PTBTokenizer gives them: lower case,
punctuation gone.

coco-caption runs Stanford's PTBTokenizer (Java, `-preserveLines -lowerCase`) and drops PUNCTUATION
from its answer. Both that and nltk's Treebank tokenizer follow the Penn Treebank; they differ in
what stays whole. So what Java leaves whole (`u.s.`, `1 1/2`, `well-lit`, `and/or`, `r&b`, `!!!`) is
taken out first, and Treebank splits the words that are left (`do n't`, `can not`, `dog 's`). Of
several rules that hold, Java takes the longest match; WHOLE is ordered so that the first match is
the longest. What Java knows of characters outside ASCII stands in data/characters.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nltk.tokenize.treebank import TreebankWordTokenizer

from data.characters import DIGIT, DROPPED, LETTER, MARK, SPACE, classify

# What coco-caption drops. Its bracket names are in upper case, so they never meet a lower-case
# token: brackets stay.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
TREEBANK = TreebankWordTokenizer()
# stands in Treebank's text for a token taken out; a private character: Java drops it from captions
TAKEN = "\ue000"

# Java's spelling of single signs, and of quotes that stand together.
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

# Abbreviations that keep their dot: those that may end a sentence (Java then looks past the next
# letter), those that may not, those that ask for a capital first, and those that ask for a number
# after.
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
# A lone letter keeps its dot (`plan b.`) unless one of these opens a sentence after it.
OPENERS = r"""A|About|According|Additionally|After|An|As|At|But|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|
    One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You|M[rs]\."""

# The rules read what `classify` makes of a caption: LETTER stands for any letter that is not ASCII,
# MARK for any combining mark, `“` for any low or double quotation mark, and so on
# (data/characters.py).
B = rf"[a-z{LETTER}]"  # a letter
D = rf"[0-9{DIGIT}]"  # a digit
A = rf"[a-z{LETTER}0-9{DIGIT}]"  # what stands between hyphens: Java takes no combining mark there
L = rf"[a-z{LETTER}{MARK}\xad]"  # a letter of a word: combining marks and soft hyphens too
LD = (
    rf"[a-z{LETTER}{MARK}\xad0-9{DIGIT}]"  # what a word goes on with: a letter of a word or a digit
)
S = rf"[\s\xa0{SPACE}]"  # a blank
Q = "['’`‘]"  # an apostrophe
ACRONYM = r"[a-z](?:\.[a-z])+"
STEM = (
    "['’](?:[smd]|re|ve|ll)"  # of `it's`, `I'm`, `they're`; a plain quote may open a word instead
)
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
# Java's range `,-_` leaves capitals, digits and hyphens out of a host; what is not ASCII may stand
# in it.
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
# ASCII: to Java `İ`, `ı`, `ſ` and `K` are none of [a-z]
FLAGS = re.VERBOSE | re.IGNORECASE | re.ASCII
# A run of letters before a blank is always a word: tried first, as most tokens are one.
SCAN = re.compile(
    rf"(?P<alone>{L}+)(?=[\ \t]|$) | (?P<whole>{WHOLE}) | (?P<word>{WORD}) | {SIGN}", FLAGS
)
UNKNOWN = frozenset([DROPPED, "‐", "٫"])  # what Java drops where it stands alone

# The short way. PLAIN, nine captions of ten: letters, spaces, commas, one last full stop. NEARLY,
# most of the rest: words of two letters or more may also be joined by hyphens, or own something
# (`man's`). Treebank's contractions and a last word that keeps its dot go the long way.
PLAIN = re.compile(r"([A-Za-z,\s]*)(\.?)\s*")
NEARLY = re.compile(
    r"((?:[A-Za-z]{2,}(?:(?:-[A-Za-z]{2,})+|'s)?(?![^\s,.])|[A-Za-z](?![^\s,.])|,(?!\S)|\s)*)(\.?)\s*"
)
SPLIT = frozenset(["cannot", "gimme", "gonna", "gotta", "lemme", "wanna"])
KEEPS_DOT = re.compile(rf"{ENDING}|{TITLE}|{CAPITAL}|[a-z]", re.VERBOSE)


def tokenize(caption: str) -> list[str]:
    """Give the words of one caption."""
    if plain := PLAIN.fullmatch(caption):
        words = plain[1].lower().replace(",", " ").split()
    elif plain := NEARLY.fullmatch(caption):
        words = plain[1].lower().replace(",", " ").replace("'s", " 's").split()
    if (
        plain
        and words
        and SPLIT.isdisjoint(words)
        and not (plain[2] and KEEPS_DOT.fullmatch(words[-1]))
    ):
        return words
    return _tokenize_any(caption)


def tokenize_all(captions: Iterable[str]) -> list[list[str]]:
    """Give the words of each caption, in order."""
    return [tokenize(caption) for caption in captions]


def _tokenize_any(caption: str) -> list[str]:
    """Give the words of any caption; some 60 times as slow as the short way."""
    caption = caption.translate(LINE_ENDS).replace("&apos;", "'")
    taken: list[str] = []

    def take(match: re.Match[str]) -> str:
        token = caption[match.start() : match.end()]
        if (match["alone"] or match["word"]) is not None:
            return split(token, match["stem"])
        if match["whole"] is not None:
            token = token.replace(" ", "\xa0").replace("&amp;", "&")
            if not token.endswith(">"):  # brackets in mark-up stay, those of :-) do not
                token = token.replace("(", SIGNS["("]).replace(")", SIGNS[")"])
            if token[0] not in "<#" and "/" not in token and "@" not in token:  # a word or a number
                token = token.replace("\xad", "")
        elif (
            match[0] in UNKNOWN
        ):  # match[0] is what `classify` wrote, token the caption's own characters
            return " "
        else:
            token = SIGNS.get(token, token).translate(QUOTES)
        return keep(token)

    def split(word: str, stem: str | None) -> str:
        """Leave an English word to Treebank; other words are whole but for their ending
        (`café's`).
        """
        plain = word.replace("\xad", "").translate(PLAIN_QUOTES)
        if stem:
            stem, _, ending = plain.rpartition("'")
            return f"{keep(stem)} '{ending.lower()} "
        if plain.isascii() and ("\xad" not in word or plain.lower().endswith("n't")):
            return f" {plain.lower()} "
        return keep(plain)

    def keep(token: str) -> str:
        if not token or token in PUNCTUATION or not token.strip("."):
            return " "
        taken.append(_lower(token))
        return f" {TAKEN} "

    text = SCAN.sub(take, classify(caption))
    rest = iter(taken)
    return [
        next(rest) if word == TAKEN else word
        for word in TREEBANK.tokenize(text)
        if word not in PUNCTUATION
    ]


def _lower(token: str) -> str:
    """Java's lower case: where Python ends a word for the final sigma (`ΟΔΟΣ-ΕΡΜΟΥ`), Java may
    not.
    """
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
