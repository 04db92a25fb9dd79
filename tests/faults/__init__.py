"""What breaks things: kills, crash points, outages, full disks, answers of S3 that are spoilt, the campaigns."""
