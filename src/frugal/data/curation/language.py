"""Leave out documents in other languages."""

from __future__ import annotations

from typing import Any

from frugal.data.curation.base import DocumentFilter, Drop, Measured
from frugal.errors import UserError, require


class Language(DocumentFilter):
    """Keep documents in some languages, as py3langid sees them: naive Bayes on byte n-grams (Lui and Baldwin 2012).

    Args:
        keep: ISO 639-1 codes.
        characters: how much of the document's middle is looked at; more is slower and hardly surer.
    """

    def __init__(self, keep: list[str], characters: int = 400) -> None:
        require(bool(keep), "data.curation: Language.keep: name at least one language, such as en")
        require(characters > 0, f"data.curation: Language.characters: must be positive, got {characters}")
        self.keep, self.characters = list(keep), characters
        self._identifier: Any = None

    def __call__(self, document: Measured) -> str | Drop:
        """Another language, or the text."""
        if self._identifier is None:
            try:
                from py3langid.langid import MODEL_FILE, LanguageIdentifier
            except ImportError:
                raise UserError("data.curation: Language needs py3langid; pip install -e '.[curation]'") from None
            self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
            known = set(self._identifier.labels)
            if unknown := [code for code in self.keep if code not in known]:
                raise UserError(f"data.curation: Language.keep: {unknown[0]!r} is not an ISO 639-1 code that is known")
        start = max(0, (len(document.text) - self.characters) // 2)
        code = self._identifier.classify(document.text[start : start + self.characters])[0]
        return document.text if code in self.keep else Drop(f"language {code}")
