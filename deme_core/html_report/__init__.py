"""The web pages that say what runs found: one file each, which opens without any network.

`content` says what a page shows, as plain data; ``templates`` how it looks; `page` puts one into the other.
"""

from deme_core.html_report.page import comparison_page, run_page

__all__ = ["comparison_page", "run_page"]
