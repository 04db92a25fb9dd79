"""From folders of any layout to one manifest: which cases there are, what their values mean, which fold each is in.

In: folders, dataset.json, file names. Out: a `Manifest`, and what was not taken, with the reason. Runs in the driver.
"""
