"The fault list is whole, and its page says so; rows of it that need a command of their own."

import json

import faults
import pytest


@pytest.mark.xfail(strict=True)  # until all are here
def test_every_row_has_a_test():
    assert faults.wrong(faults.tests_of_rows()) == []


def test_the_page_is_up_to_date():
    page = json.loads(faults.PAGE.read_text("utf-8"))
    assert "".join(faults.table_cell(page)["source"]) == faults.table(faults.tests_of_rows()), "run make fix"


def test_a_row_without_a_test_is_named(tmp_path):
    (tmp_path / "test_x.py").write_text("@pytest.mark.fault(3)\n@pytest.mark.long\ndef test_three():\n    pass\n")
    found = faults.tests_of_rows(tmp_path)
    assert found == {3: [("test_x.py", "test_three")]}
    lacking = faults.wrong(found)
    assert len(lacking) == len(faults.FAULTS) - 1 and lacking[0].startswith("row 1 has no test: kill -9")
    (tmp_path / "test_y.py").write_text("@pytest.mark.fault(2, 99)\ndef test_unknown():\n    pass\n")
    assert "test_y.py: test_unknown names row 99" in faults.wrong(faults.tests_of_rows(tmp_path))
