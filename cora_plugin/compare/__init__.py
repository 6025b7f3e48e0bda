"""Comparisons: a task quantized in several ways, each judged against the float network.

* `task`: a float network with the images that calibrate and judge;
* `experiment`: makes the models that are compared;
* `rows`: what is said of each, and the table.
"""
