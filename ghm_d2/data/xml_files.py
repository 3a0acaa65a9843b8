"""XML from anywhere: no entities, and text in the encodings that labelling tools write."""

import codecs
import re
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

_LARGEST = 1 << 28  # bytes; the XML of an image has a few thousand, that of a CVAT task millions
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
# GB 18030 reads everything that GB 2312 and GBK, its predecessors, can write.
_CHINESE = "gb18030"
_WIDER = {"gb2312": _CHINESE, "gbk": _CHINESE, "cp936": _CHINESE}


def read_xml(file: Path) -> Element:
    """Parse an XML file that may come from anywhere.

    A document type is refused: without one there are no entities, neither external ones nor those
    that grow to gigabytes.

    Raises:
        ValueError: the file is not well-formed XML, has a document type, or is larger than 256 MiB.
        OSError: it cannot be read.
    """
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"is larger than {_LARGEST >> 20} MiB")
    text = _decode(file.read_bytes())
    try:
        return fromstring(text, forbid_dtd=True)
    except DefusedXmlException as error:
        raise ValueError(
            "has a document type (<!DOCTYPE ...>), which could define entities: remove it"
        ) from error
    except (ParseError, ValueError, RecursionError) as error:
        raise ValueError(f"is not well-formed XML ({error})") from error


def _decode(data: bytes) -> str:
    """Decodes by the byte order mark or the declaration, otherwise as UTF-8 or GB 18030."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return _decoded(data, [name])
    declared = _DECLARED.match(data[:200])
    name = declared[1].decode().lower() if declared else "utf-8"
    return _decoded(data, [_WIDER.get(name, name), "utf-8", _CHINESE])


def _decoded(data: bytes, names: list[str]) -> str:
    for name in names:
        try:
            return data.decode(name).lstrip("\ufeff")
        except (UnicodeError, LookupError):
            continue
    raise ValueError(f"is not well-formed XML (it is not text in {names[0]}: save it as UTF-8)")
