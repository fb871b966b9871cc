"""The codes of languages that a user asks for, as the labels of a model: which ones it knows, and what may be meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from run_contract.errors import UserError
from snakmodel.filter.fasttext_file import PREFIX

_TWO_AND_THREE = """
aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bi:bis bm:bam
bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu cv:chv cy:cym da:dan de:deu dv:div dz:dzo
ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry ga:gle gd:gla gl:glg
gn:grn gu:guj gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina id:ind ie:ile ig:ibo ii:iii
ik:ipk io:ido is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor kr:kau
ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri
mk:mkd ml:mal mn:mon mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav
ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan pi:pli pl:pol ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin
sa:san sc:srd sd:snd se:sme sg:sag sh:hbs si:sin sk:slk sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun
sv:swe sw:swa ta:tam te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig
uk:ukr ur:urd uz:uzb ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho zu:zul
"""
_PAIRS = [pair.split(":") for pair in _TWO_AND_THREE.split()]
OTHER_CODE = {**dict(_PAIRS), **{three: two for two, three in _PAIRS}}
"""The three-letter code (ISO 639-3) of each two-letter code (ISO 639-1), and the other way round."""


def known_labels(asked: Iterable[str], labels: Sequence[str], model: str) -> frozenset[str]:
    """The labels that a user asks for, with or without the prefix `__label__`.

    Raises UserError if the model does not have one of them, and names the labels that may be meant.
    """
    found = frozenset(label.removeprefix(PREFIX) for label in asked)
    for label in sorted(found - set(labels)):
        if near := nearest(label, labels):
            raise UserError(
                f"the model {model} does not know the language {label!r}; did you mean {' or '.join(near)}?"
            )
        examples = ", ".join(sorted(labels)[:10])
        raise UserError(
            f"the model {model} does not know the language {label!r}; it has {len(labels)} labels, such as {examples}"
        )
    return found


def nearest(label: str, labels: Sequence[str]) -> list[str]:
    """Up to four labels that may be meant by one that a model does not have.

    The same language in another code or with a script (`da`, `dan`, `dan_Latn`) comes before similar spelling.
    """
    code = _language(label)
    same = {code, OTHER_CODE.get(code, code)}
    found = [known for known in labels if _language(known) in same]
    return (found or difflib.get_close_matches(label, labels, 4))[:4]


def _language(label: str) -> str:
    """The code of the language in a label, without script or country."""
    return label.replace("-", "_").split("_")[0].lower()
