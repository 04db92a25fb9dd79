"""Every private name of Ray that this package uses is in this folder, with its reason. Runs in any process.

In: Ray 2.60's own modules. Out: plain functions and base classes for the rest of the package.

Nobody else may name a private symbol of Ray (tests/unit/test_layers.py); when an upgrade changes one, a contract test
fails with the list (tests/unit/test_internals.py). `ATTRIBUTES` of each module names what is touched on Ray's objects.
"""
