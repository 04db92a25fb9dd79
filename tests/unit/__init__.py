"""What needs no Ray and takes seconds: functions, files, commands with a plain map in place of Ray, moto for AWS."""
