"""What Ray 2.60 lacks for an elastic run: joining a cluster, node roles, live nodes, warm processes.

In: the environment, Ray's nodes. Out: a connection, resources, policies. Knows no run folder. Runs in any process.
"""
