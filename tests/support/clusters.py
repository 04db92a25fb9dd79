"""Ray clusters of several nodes on this machine, the runs on them, and the run that they are held against."""

from scripts.bench_pipelines.meter import Meter
from scripts.chaos_campaign.ray_cluster import SMALL, Cluster, ElasticRun, free_port
from scripts.chaos_campaign.setting import train_alone

__all__ = ["SMALL", "Cluster", "ElasticRun", "Meter", "free_port", "train_alone"]
