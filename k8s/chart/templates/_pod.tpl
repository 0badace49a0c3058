{{/*
The pod of every arm, so that arms differ in their artifact alone: (dict "root" $ "name" $name "arm" $arm).
*/}}
{{- define "drbert.pod" -}}
metadata:
  labels:
    {{- $labels := include "drbert.ofArm" (dict "root" .root "arm" .arm "key" "podLabels") | fromYaml }}
    {{- include "drbert.podLabels" (dict "root" .root "component" "arm" "arm" .name "own" $labels) | nindent 4 }}
    pod-spec: {{ include "drbert.podDigest" . | quote }}
  annotations:
    kubectl.kubernetes.io/default-container: drbert
    {{- with include "drbert.ofArm" (dict "root" .root "arm" .arm "key" "podAnnotations") | fromYaml }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "drbert.podSpec" . | trim | nindent 2 }}
{{- end -}}

{{/* Tells the pods of this render from those of an earlier one, which a rollout leaves beside them for a while. */}}
{{- define "drbert.podDigest" -}}
{{ include "drbert.podSpec" . | trim | sha256sum | trunc 10 }}
{{- end -}}

{{- define "drbert.podSpec" -}}
{{- $values := .root.Values -}}
{{- $model := include "drbert.model" . | fromYaml -}}
{{- $own := dict -}}
{{- range $key := list "resources" "nodeSelector" "tolerations" "affinity" "variant" "env" "extraEnvFrom" "extraVolumes" "extraVolumeMounts" -}}
{{- $_ := set $own $key (printf "value:\n%s" (include "drbert.ofArm" (dict "root" $.root "arm" $.arm "key" $key) | trim | indent 2) | fromYaml).value -}}
{{- end -}}
{{- with include "drbert.pullSecrets" .root | trim }}
{{ . }}
{{- end }}
serviceAccountName: {{ include "drbert.serviceAccount" .root }}
automountServiceAccountToken: false
# Services would put variables of their own beside DRBERT_*.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "drbert.graceSeconds" . }}
securityContext:
  {{- include "drbert.podSecurity" .root | nindent 2 }}
{{- with ternary $values.gpu.runtimeClassName "" $values.gpu.enabled }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with $values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with $values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat $own.tolerations (ternary $values.gpu.tolerations list $values.gpu.enabled) }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or $values.spread.enabled $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- with $values.topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- if $values.spread.enabled }}
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "drbert.selector" (dict "root" $.root "component" "arm" "arm" $.name) | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}
{{- if or (eq $model.source "initContainer") $model.digest $values.extraInitContainers }}
initContainers:
  {{- with $values.extraInitContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if eq $model.source "initContainer" }}
  - name: model
    image: {{ $model.initContainer.image }}
    {{- with $model.initContainer.command }}
    command:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $model.initContainer.args }}
    args:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $model.initContainer.env }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $model.initContainer.envFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "drbert.containerSecurity" .root | nindent 6 }}
    resources:
      {{- toYaml $own.resources | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
      {{- with $own.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  {{- end }}
  {{- if $model.digest }}
  # The service holds every file against the manifest; this holds the manifest against what was asked for.
  - name: digest
    image: {{ include "drbert.armImage" . }}
    imagePullPolicy: {{ (include "drbert.armImages" . | fromYaml).pullPolicy }}
    command: [sh, -c, 'echo "$DIGEST  $MANIFEST" | sha256sum --check --strict']
    env:
      - {name: DIGEST, value: {{ $model.digest | quote }}}
      - {name: MANIFEST, value: {{ printf "%s/manifest.json" (include "drbert.artifact" .) | quote }}}
    securityContext:
      {{- include "drbert.containerSecurity" .root | nindent 6 }}
    resources:
      {{- toYaml $own.resources | nindent 6 }}
    {{- if ne $model.source "baked" }}
    volumeMounts:
      {{- include "drbert.modelMount" $model | nindent 6 }}
    {{- end }}
  {{- end }}
{{- end }}
containers:
  - name: drbert
    image: {{ include "drbert.armImage" . }}
    imagePullPolicy: {{ (include "drbert.armImages" . | fromYaml).pullPolicy }}
    args:
      - {{ printf "%s=%s" (default .name .arm.modelName) (include "drbert.artifact" .) }}
      - --host
      - {{ $values.host | quote }}
      - --port
      - "8000"
      {{- if ne $own.variant "auto" }}
      - --variant
      - {{ $own.variant }}
      {{- end }}
    {{- with include "drbert.env" . }}
    env:
      {{- trim . | nindent 6 }}
    {{- end }}
    {{- with $own.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      - {name: http, containerPort: 8000}
      {{- if $values.admin.enabled }}
      - {name: admin, containerPort: {{ $values.admin.port }}}
      {{- end }}
    # Answers once the model is loaded and warmed up.
    startupProbe:
      {{- include "drbert.probe" (dict "root" .root "path" "/readyz") | nindent 6 }}
      periodSeconds: 2
      failureThreshold: {{ div (add1 (int $model.loadTimeoutSeconds)) 2 }}
    # Not ready while it drains or its engine is stuck.
    readinessProbe:
      {{- include "drbert.probe" (dict "root" .root "path" "/readyz") | nindent 6 }}
      periodSeconds: 5
      timeoutSeconds: 2
      failureThreshold: 2
    # The event loop alone: a restart loads the model anew and mends no overload.
    livenessProbe:
      {{- include "drbert.probe" (dict "root" .root "path" "/livez") | nindent 6 }}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
    {{- with include "drbert.lifecycle" .root | fromYaml }}
    lifecycle:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "drbert.containerSecurity" .root | nindent 6 }}
    resources:
      {{- include "drbert.resources" (dict "root" .root "resources" $own.resources) | nindent 6 }}
    terminationMessagePolicy: FallbackToLogsOnError
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- if ne $model.source "baked" }}
      {{- include "drbert.modelMount" $model | nindent 6 }}
      {{- end }}
      {{- if $values.gpu.enabled }}
      - {name: shared-memory, mountPath: /dev/shm}
      - {name: cache, mountPath: /cache}
      {{- end }}
      {{- range $mount, $secret := include "drbert.secrets" .root | fromYaml }}
      - {name: {{ $mount }}, mountPath: /etc/drbert/{{ $mount }}, readOnly: true}
      {{- end }}
      {{- with $own.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  {{- with $values.extraContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: {{ $values.security.tmpSize }}}
  {{- if eq $model.source "pvc" }}
  - name: models
    persistentVolumeClaim: {claimName: {{ $model.pvc.claimName }}, readOnly: true}
  {{- else if eq $model.source "initContainer" }}
  - name: models
    emptyDir: {sizeLimit: {{ $model.initContainer.sizeLimit }}}
  {{- else if eq $model.source "imageVolume" }}
  - name: models
    image: {reference: {{ $model.imageVolume.reference | quote }}, pullPolicy: {{ $model.imageVolume.pullPolicy }}}
  {{- end }}
  {{- if $values.gpu.enabled }}
  - name: shared-memory
    emptyDir: {medium: Memory, sizeLimit: {{ $values.gpu.sharedMemory }}}
  - name: cache
    {{- with $values.gpu.cache.existingClaim }}
    persistentVolumeClaim: {claimName: {{ . }}}
    {{- else }}
    emptyDir: {sizeLimit: {{ $values.gpu.cache.size }}}
    {{- end }}
  {{- end }}
  {{- range $mount, $secret := include "drbert.secrets" .root | fromYaml }}
  - name: {{ $mount }}
    secret: {secretName: {{ $secret }}}
  {{- end }}
  {{- with $own.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Where an arm's model comes from: its own words over everybody's. */}}
{{- define "drbert.model" -}}
{{ toYaml (mustMergeOverwrite (deepCopy .root.Values.model) (deepCopy (default dict .arm.model))) }}
{{- end -}}

{{- define "drbert.artifact" -}}
{{ default (printf "/models/%s" .name) .arm.artifact }}
{{- end -}}

{{- define "drbert.armImage" -}}
{{ include "drbert.image" (list .root (include "drbert.armImages" . | fromYaml)) }}
{{- end -}}

{{/* The image's values: an arm's own words over everybody's, whose digest is not of the arm's tag or repository. */}}
{{- define "drbert.armImages" -}}
{{- $all := deepCopy .root.Values.image -}}
{{- $own := default dict .arm.image -}}
{{- if and (or $own.tag $own.repository) (not $own.digest) -}}{{- $_ := set $all "digest" "" -}}{{- end -}}
{{ toYaml (mustMergeOverwrite $all (deepCopy $own)) }}
{{- end -}}

{{- define "drbert.modelMount" -}}
- name: models
  mountPath: /models
  readOnly: true
  {{- if and (eq .source "pvc") .pvc.subPath }}
  subPath: {{ .pvc.subPath }}
  {{- end }}
{{- end -}}

{{- define "drbert.probe" -}}
httpGet: {path: {{ .path }}, port: http{{ if .root.Values.tls.existingSecret }}, scheme: HTTPS{{ end }}}
{{- end -}}

{{/* Mounted Secrets by the folder under /etc/drbert. */}}
{{- define "drbert.secrets" -}}
{{- $found := dict -}}
{{- if .Values.apiKeys.existingSecret }}{{ $_ := set $found "api-keys" .Values.apiKeys.existingSecret }}{{ end -}}
{{- if .Values.tls.existingSecret }}{{ $_ := set $found "tls" .Values.tls.existingSecret }}{{ end -}}
{{- if .Values.admin.enabled }}{{ $_ := set $found "admin-keys" .Values.admin.existingSecret }}{{ end -}}
{{ toYaml $found }}
{{- end -}}

{{/* Settings whose variables were renamed; the values keep the former names. */}}
{{- define "drbert.renamedSettings" -}}
gpu_table: gpu_shapes_file
max_bodies_bytes: max_inflight_body_bytes
max_waiting: max_queue_size
stall_after_s: engine_stall_timeout_s
{{- end -}}

{{- define "drbert.env" -}}
{{- $renamed := include "drbert.renamedSettings" . | fromYaml }}
{{- $settings := include "drbert.ofArm" (dict "root" .root "arm" .arm "key" "settings") | fromYaml }}
{{- $env := include "drbert.ofArm" (dict "root" .root "arm" .arm "key" "env") | fromYamlArray }}
{{- range $name, $value := $settings }}
{{- /* A measurement keeps its connections: each new one would count as time. */}}
{{- if not (or (kindIs "invalid" $value) (and $.root.Values.proof.enabled (has $name (list "max_connection_age_s" "max_connection_requests")))) }}
- {name: DRBERT_{{ get $renamed $name | default $name | upper }}, value: {{ include "drbert.plain" $value | quote }}}
{{- end }}
{{- end }}
{{- if $.root.Values.apiKeys.existingSecret }}
- {name: DRBERT_API_KEYS_FILE, value: /etc/drbert/api-keys/{{ $.root.Values.apiKeys.key }}}
{{- end }}
{{- if $.root.Values.tls.existingSecret }}
- {name: DRBERT_TLS_CERTIFICATE, value: /etc/drbert/tls/tls.crt}
- {name: DRBERT_TLS_KEY, value: /etc/drbert/tls/tls.key}
{{- end }}
{{- if $.root.Values.gpu.enabled }}
- {name: DRBERT_GPU_CACHE, value: /cache}
{{- end }}
{{- if $.root.Values.admin.enabled }}
- {name: DRBERT_ADMIN_PORT, value: {{ $.root.Values.admin.port | quote }}}
- {name: DRBERT_ADMIN_HOST, value: {{ $.root.Values.host | quote }}}
- {name: DRBERT_ADMIN_KEYS_FILE, value: /etc/drbert/admin-keys/{{ $.root.Values.admin.key }}}
{{- end }}
{{- with $env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Seconds before SIGTERM: of the chart's pause, or of a preStop of the values. */}}
{{- define "drbert.pauseSeconds" -}}
{{- $preStop := .Values.lifecycle.preStop -}}
{{- if not $preStop -}}
{{ int .Values.shutdown.preStopSeconds }}
{{- else if $preStop.sleep -}}
{{ int $preStop.sleep.seconds }}
{{- else if kindIs "invalid" .Values.shutdown.graceSeconds -}}
{{- fail "lifecycle.preStop takes a time that the chart cannot know; give shutdown.graceSeconds, which is for it, settings.drain_timeout_s and 10 seconds." -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{/* preStop, then the service's own drain, then its goodbye; refused if somebody gives less. */}}
{{- define "drbert.graceSeconds" -}}
{{- $settings := include "drbert.ofArm" (dict "root" .root "arm" .arm "key" "settings") | fromYaml -}}
{{- $drain := default 20 $settings.drain_timeout_s | float64 | ceil | int -}}
{{- $pause := include "drbert.pauseSeconds" .root | int -}}
{{- $least := add $pause $drain 10 | int -}}
{{- if kindIs "invalid" .root.Values.shutdown.graceSeconds -}}
{{ $least }}
{{- else if lt (int .root.Values.shutdown.graceSeconds) $least -}}
{{- fail (printf "shutdown.graceSeconds is %d, and a pod that goes away needs %d: %d of preStopSeconds, %d of settings.drain_timeout_s and 10 to end; raise it, leave it out, or lower those." (int .root.Values.shutdown.graceSeconds) $least $pause $drain) -}}
{{- else -}}
{{ int .root.Values.shutdown.graceSeconds }}
{{- end -}}
{{- end -}}

{{/* A GPU is requested as it is limited; Kubernetes knows no other way. */}}
{{- define "drbert.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- $gpus := .root.Values.gpu -}}
{{- if $gpus.enabled -}}
{{- $gpu := dict $gpus.resourceName (int $gpus.count) -}}
{{- /* merge changes its first argument. */ -}}
{{- $_ := set $resources "requests" (merge (deepCopy $gpu) (default dict $resources.requests)) -}}
{{- $_ := set $resources "limits" (merge (deepCopy $gpu) (default dict $resources.limits)) -}}
{{- end -}}
{{ toYaml $resources }}
{{- end -}}

{{/* The pause before SIGTERM, and handlers of the values in its place or beside it. */}}
{{- define "drbert.lifecycle" -}}
{{- $handlers := dict -}}
{{- $seconds := int .Values.shutdown.preStopSeconds -}}
{{- if $seconds -}}
{{- $exec := dict "exec" (dict "command" (list "sleep" (toString $seconds))) -}}
{{- $sleep := dict "sleep" (dict "seconds" $seconds) -}}
{{- $_ := set $handlers "preStop" (ternary $sleep $exec (semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version)) -}}
{{- end -}}
{{- range $name, $handler := .Values.lifecycle -}}{{- $_ := set $handlers $name $handler -}}{{- end -}}
{{ toYaml $handlers }}
{{- end -}}

{{- define "drbert.podSecurity" -}}
runAsNonRoot: true
{{- if .Values.security.setIds }}
runAsUser: {{ int64 .Values.security.runAsUser }}
runAsGroup: {{ int64 .Values.security.runAsGroup }}
fsGroup: {{ int64 .Values.security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: {{ .Values.security.seccompProfile }}}
{{- end -}}

{{- define "drbert.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ .Values.security.readOnlyRootFilesystem }}
capabilities: {drop: [ALL]}
{{- end -}}
