{{/*
A name of at most 54 characters: (list root "suffix" …). What is too long ends with a digest of the whole.
Labels hold 63, and KEDA makes one of "keda-hpa-" and a name.
*/}}
{{- define "drbert.name" -}}
{{- $root := first . -}}
{{- /* A release's name may hold dots, a Service's may not. */ -}}
{{- $whole := prepend (rest .) (default $root.Release.Name $root.Values.nameOverride) | join "-" | replace "." "-" -}}
{{- if gt (len $whole) 54 -}}
{{- printf "%s-%s" ($whole | trunc 45 | trimSuffix "-") (sha256sum $whole | trunc 8) -}}
{{- else -}}
{{- $whole -}}
{{- end -}}
{{- end -}}

{{/* What selects pods: (dict "root" $ "component" "arm" "arm" $name). Never changes, for selectors cannot. */}}
{{- define "drbert.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- with .arm }}
arm: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "drbert.labels" -}}
{{ include "drbert.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods, without versions: a newer chart that changes nothing of a pod then leaves it alone. */}}
{{- define "drbert.podLabels" -}}
{{ include "drbert.selector" . }}
{{- with merge (deepCopy .own) .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* repository@digest or repository:tag of (list root image), in the registry that a parent chart names for all. */}}
{{- define "drbert.image" -}}
{{- $root := first . -}}
{{- $image := last . -}}
{{- $registry := default "" (default dict $root.Values.global).imageRegistry -}}
{{- /* The first part of a name with a registry has a dot or a port. */ -}}
{{- $names := regexMatch "^([^/]*[.:][^/]*|localhost)/" $image.repository -}}
{{- $repository := ternary (printf "%s/%s" $registry $image.repository) $image.repository (and (ne $registry "") (not $names)) -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $repository $image.digest }}
{{- else -}}
{{ printf "%s:%s" $repository (default $root.Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end -}}

{{/* Secrets for the registry: the chart's own and a parent chart's, which are names or objects. */}}
{{- define "drbert.pullSecrets" -}}
{{- $secrets := list -}}
{{- range concat .Values.imagePullSecrets (default list (default dict .Values.global).imagePullSecrets) -}}
{{- $secrets = append $secrets (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end -}}
{{- with uniq $secrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The arms that are not switched off, by name. A parent chart's values cannot take an arm away by null. */}}
{{- define "drbert.arms" -}}
{{- $arms := dict -}}
{{- range $name, $arm := .Values.arms -}}
{{- if ne (toString $arm.enabled) "false" -}}{{- $_ := set $arms $name $arm -}}{{- end -}}
{{- end -}}
{{ toYaml $arms }}
{{- end -}}

{{/* A value of an arm, as YAML: its own over everybody's. Maps are merged: (dict "root" $ "arm" $arm "key" "resources"). */}}
{{- define "drbert.ofArm" -}}
{{- $all := get .root.Values .key -}}
{{- $own := get .arm .key -}}
{{- if not (hasKey .arm .key) -}}
{{ toYaml $all }}
{{- else if kindIs "map" $all -}}
{{ toYaml (mustMergeOverwrite (deepCopy $all) (deepCopy $own)) }}
{{- else -}}
{{ toYaml $own }}
{{- end -}}
{{- end -}}

{{/* Where pods that are no arms run: where the arms do. */}}
{{- define "drbert.helperPlacement" -}}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat .Values.tolerations (ternary .Values.gpu.tolerations list .Values.gpu.enabled) }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- include "drbert.helperSpec" . }}
{{- end -}}

{{- define "drbert.helperSpec" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with .Values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "drbert.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "drbert.name" (list .)) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{/* Whole numbers come out of YAML as floats, and a million would be written 1e+06. */}}
{{- define "drbert.plain" -}}
{{- if not (kindIs "float64" .) -}}{{ . }}{{- else if eq (floor .) . -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{- define "drbert.scheme" -}}
{{ ternary "https" "http" (ne (default "" .Values.tls.existingSecret) "") }}
{{- end -}}

{{/* The port on which /metrics is answered. */}}
{{- define "drbert.metricsPort" -}}
{{ ternary "admin" "http" (eq (default "service" .Values.settings.metrics) "admin") }}
{{- end -}}
