from qcore.testing import check_format
from qplug_scaffold.scaffold import Scaffold


def test_scaffold_is_a_number_format():
    check_format(Scaffold())
