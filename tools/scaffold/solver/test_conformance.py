from qcore.testing import check_solver
from qplug_scaffold.scaffold import Scaffold


def test_scaffold_is_no_worse_than_rounding_to_nearest():
    check_solver(Scaffold())
