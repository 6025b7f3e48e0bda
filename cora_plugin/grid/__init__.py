"""`cora-plugin compare`: a recipe in toolkits × PTQ recipes × bits × methods × budgets.

* `section`: the lists that a recipe's `compare` section holds;
* `cells`: one recipe for each of their combinations;
* `cell`: measures one, in a process of its own;
* `folder`: what is known of each, so that a comparison goes on where it stopped;
* `schedule`: the processes, and their limits;
* `ray`: the same on the nodes of a Ray cluster;
* `outputs`: the tables and the page;
* `command`: all of it;
* `join`: the results of several folders in one.
"""

from cora_plugin.grid.command import compare
from cora_plugin.grid.outputs import Comparison

__all__ = ["Comparison", "compare"]
