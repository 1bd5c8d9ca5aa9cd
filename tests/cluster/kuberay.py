"""The fields of KubeRay's RayCluster and RayJob (ray.io/v1) above the pod templates, as JSON Schema.

Ours, from KubeRay's field reference: its published schemas are in no package registry. Required is what any version
requires.
"""

from typing import Any

TEXT, NUMBER, SWITCH, ANY = (
    {"type": "string"},
    {"type": "integer", "minimum": 0},
    {"type": "boolean"},
    {"type": "object"},
)
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object of these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


AUTOSCALER = fields(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=NUMBER,
    image=TEXT,
    imagePullPolicy=TEXT,
    resources=ANY,
    securityContext=ANY,
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
)
HEAD = fields(
    ("rayStartParams", "template"),
    template=ANY,
    rayStartParams=TEXTS,
    serviceType=TEXT,
    headService=ANY,
    enableIngress=SWITCH,
    resources=TEXTS,
    labels=TEXTS,
)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    numOfHosts=NUMBER,
    idleTimeoutSeconds=NUMBER,
    suspend=SWITCH,
    scaleStrategy=ANY,
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    template=ANY,
)
CLUSTER_SPEC = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=SWITCH),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    headServiceAnnotations=TEXTS,
    gcsFaultToleranceOptions=ANY,
    upgradeStrategy=ANY,
    suspend=SWITCH,
    managedBy=TEXT,
)
JOB_SPEC = fields(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=ANY,
    submitterConfig=ANY,
    backoffLimit=NUMBER,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=NUMBER,
    activeDeadlineSeconds=NUMBER,
    preRunningDeadlineSeconds=NUMBER,
    clusterSelector=TEXTS,
    deletionStrategy=ANY,
    metadata=TEXTS,
    jobId=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    suspend=SWITCH,
    managedBy=TEXT,
)
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}
