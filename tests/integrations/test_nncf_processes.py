"""Two processes find for a model of NNCF what one does."""

from toolkit_processes import Shares


class TestNNCF(Shares):
    """With NNCF."""

    toolkit = "nncf"
