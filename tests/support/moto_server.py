"""A moto server for rigs: `python -m tests.support.moto_server HOST PORT FOLDER`.

In: HOST and PORT to listen on; while FOLDER/no_spot exists, EC2 has no spot capacity.
Out: EC2, IAM, S3, SSM; FOLDER/calls.jsonl, a line {who, action} for each request with an action (S3 has none).
"""

import json
import sys
from pathlib import Path
from typing import Any

from moto.core.responses import BaseResponse
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.responses.instances import InstanceResponse
from moto.server import main

from tests.support import moto_aws


class NoCapacityError(EC2ClientError):
    def __init__(self) -> None:
        super().__init__("InsufficientInstanceCapacity", "There is no Spot capacity available that matches.")


def listen(host: str, port: str, folder: Path) -> None:
    moto_aws.complete()
    answer, run = BaseResponse.call_action, InstanceResponse.run_instances

    def note(self: Any) -> Any:
        if self.service_name != "s3":
            who = self.access_key_regex.search(self.headers.get("Authorization", ""))
            line = {"who": who and who["access_key"], "action": f"{self.service_name}:{self._get_action()}"}
            with (folder / "calls.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        return answer(self)

    def run_instances(self: Any) -> Any:
        if (folder / "no_spot").exists() and self._get_param("InstanceMarketOptions.MarketType") == "spot":
            raise NoCapacityError
        return run(self)

    BaseResponse.call_action = note
    InstanceResponse.run_instances = run_instances
    main(["-H", host, "-p", port])


if __name__ == "__main__":
    listen(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
