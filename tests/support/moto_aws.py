"""What moto 5.2 leaves out of EC2 and SSM and `ray up` with our provider asks for.

In: nothing; `complete()` changes moto in this process, for good.
Out: RunInstances that starts MaxCount instances, all with their profile; placement groups; the SSM names of images.
"""

import datetime
from typing import Any

from moto.core.responses import ActionResult
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import EC2Backend
from moto.ec2.responses import EC2Response
from moto.ec2.responses.instances import InstanceResponse
from moto.ssm.models import Parameter, SimpleSystemManagerBackend

IMAGES = {"canonical": "ami-12c6146b", "deeplearning": "ami-785db401"}
"""By a word of the parameter's name; moto knows these two images."""


class PlacementGroupExistsError(EC2ClientError):
    def __init__(self) -> None:
        super().__init__("InvalidPlacementGroup.Duplicate", "The placement group already exists.")


def complete() -> None:
    asked, associate, parameter = (
        InstanceResponse._get_param,
        EC2Backend.associate_iam_instance_profile,
        SimpleSystemManagerBackend.get_parameter,
    )
    groups: dict[tuple[str, str], dict[str, Any]] = {}

    def max_count(self: Any, name: str, *rest: Any, **more: Any) -> Any:
        return asked(self, "MaxCount" if name == "MinCount" else name, *rest, **more)

    def create_placement_group(self: Any) -> ActionResult:
        key = (self.region, self._get_param("GroupName"))
        if key in groups:
            raise PlacementGroupExistsError
        tags = self._parse_tag_specification().get("placement-group", {})
        about = {"GroupName": key[1], "State": "available", "Strategy": self._get_param("Strategy")}
        groups[key] = about | {"Tags": [{"Key": name, "Value": value} for name, value in tags.items()]}
        return ActionResult({"PlacementGroup": groups[key]})

    def describe_placement_groups(self: Any) -> ActionResult:
        wanted = self._filters_from_querystring()
        states, projects = wanted.get("state"), wanted.get("tag:project")
        here = [group for (region, _), group in groups.items() if region == self.region]
        here = [group for group in here if not states or group["State"] in states]
        tagged = [g for g in here if not projects or any(t["Value"] in projects for t in g["Tags"])]
        return ActionResult({"PlacementGroups": tagged})

    def delete_placement_group(self: Any) -> ActionResult:
        groups.pop((self.region, self._get_param("GroupName")))
        return ActionResult({})

    def associate_all(self: Any, instance_id: str, **profile: Any) -> Any:
        of_one_call = next(r for r in self.reservations.values() if instance_id in [i.id for i in r.instances])
        for instance in of_one_call.instances:
            made = associate(self, instance.id, **profile)
        return made

    def get_parameter(self: Any, name: str) -> Any:
        image = next((i for word, i in IMAGES.items() if name.startswith(f"/aws/service/{word}/")), None)
        now = datetime.datetime.now(datetime.UTC)
        made = image and Parameter("", name, image, "String", None, None, None, now, 1, "aws:ec2:image")
        return made or parameter(self, name)

    InstanceResponse._get_param = max_count
    EC2Backend.associate_iam_instance_profile = associate_all
    EC2Response.create_placement_group = create_placement_group
    EC2Response.describe_placement_groups = describe_placement_groups
    EC2Response.delete_placement_group = delete_placement_group
    SimpleSystemManagerBackend.get_parameter = get_parameter
