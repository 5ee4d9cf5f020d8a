"""What the commands of plug-ins may use: progress and remarks on stderr, tables on stdout, folders that appear whole or not at all.

They appear as qcore's own do; nothing here imports torch, and rich only when something is drawn.
"""

from qcore.cli._progress import Report, progress
from qcore.cli._replace import take_place
from qcore.cli._show import remark, table

__all__ = ["Report", "progress", "remark", "table", "take_place"]
