{{/* What makes no sense together and no schema can see. Each message says what to change. */}}
{{- define "drbert.check" -}}
{{- $values := .Values -}}
{{- $references := list -}}
{{- if not (regexMatch "^[a-z]" (include "drbert.name" (list .))) -}}
{{- fail (printf "names of Services begin with a letter, and release %s does not; choose another name, or give nameOverride." .Release.Name) -}}
{{- end -}}
{{- if not (include "drbert.arms" . | fromYaml) -}}
{{- fail "there is no arm; give one in arms, with a role, and without enabled: false." -}}
{{- end -}}
{{- range $name, $arm := include "drbert.arms" $ | fromYaml -}}
{{- if eq $arm.role "reference" -}}{{- $references = append $references $name -}}{{- end -}}
{{- include "drbert.checkModel" (dict "root" $ "name" $name "arm" $arm) -}}
{{- end -}}
{{- if gt (len $references) 1 -}}
{{- fail (printf "arms %s are all references, and latencies are compared with one; make the others candidates." (join " and " $references)) -}}
{{- end -}}
{{- if and $values.autoscaling.hpa.enabled $values.autoscaling.keda.enabled -}}
{{- fail "autoscaling.hpa and autoscaling.keda are both enabled, and would fight over the replicas; choose one." -}}
{{- end -}}
{{- if and $values.autoscaling.keda.enabled (not $values.autoscaling.keda.serverAddress) -}}
{{- fail "autoscaling.keda asks Prometheus; give autoscaling.keda.serverAddress, such as http://prometheus.monitoring:9090." -}}
{{- end -}}
{{- range $name, $arm := include "drbert.arms" $ | fromYaml -}}
{{- $scaling := include "drbert.ofArm" (dict "root" $ "arm" $arm "key" "autoscaling") | fromYaml -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas (%d) is above autoscaling.maxReplicas (%d), of arm %s." (int $scaling.minReplicas) (int $scaling.maxReplicas) $name) -}}
{{- end -}}
{{- end -}}
{{- if and $values.admin.enabled (not $values.admin.existingSecret) -}}
{{- fail "admin.enabled lets whoever reaches the port replace models; give admin.existingSecret, a Secret with the keys of those who may." -}}
{{- end -}}
{{- if and (eq (default "service" $values.settings.metrics) "admin") (not $values.admin.enabled) -}}
{{- fail "settings.metrics is admin, and there is no such port; set admin.enabled." -}}
{{- end -}}
{{- if and $values.admin.enabled $values.networkPolicy.enabled (not $values.networkPolicy.admins) (not (and (eq (default "service" $values.settings.metrics) "admin") $values.networkPolicy.monitoring)) -}}
{{- fail "admin.enabled opens a port that the NetworkPolicy lets nobody reach; name who may in networkPolicy.admins, or in networkPolicy.monitoring where settings.metrics is admin." -}}
{{- end -}}
{{- if and $values.monitoring.serviceMonitor.enabled $values.networkPolicy.enabled (not $values.networkPolicy.monitoring) (or $values.networkPolicy.clients (eq (include "drbert.metricsPort" .) "admin")) -}}
{{- fail "monitoring.serviceMonitor asks for a scrape that the NetworkPolicy lets nobody make; name Prometheus in networkPolicy.monitoring." -}}
{{- end -}}
{{- $env := $values.env -}}
{{- range $name, $arm := include "drbert.arms" $ | fromYaml -}}{{- $env = concat $env (default list $arm.env) -}}{{- end -}}
{{- range $variable := $env -}}
{{- if hasPrefix "DRBERT_" $variable.name -}}
{{- $setting := $variable.name | trimPrefix "DRBERT_" | lower -}}
{{- range $former, $current := include "drbert.renamedSettings" $ | fromYaml -}}
{{- if eq $current $setting -}}{{- $setting = $former -}}{{- end -}}
{{- end -}}
{{- fail (printf "env holds %s, past what the chart works out from the settings; give settings.%s." $variable.name $setting) -}}
{{- end -}}
{{- end -}}
{{- if $values.model.digest -}}
{{- $artifacts := dict -}}
{{- range $name, $arm := include "drbert.arms" $ | fromYaml -}}
{{- if eq (dig "model" "digest" "" $arm) "" -}}{{- $_ := set $artifacts (include "drbert.artifact" (dict "root" $ "name" $name "arm" $arm)) $name -}}{{- end -}}
{{- end -}}
{{- if gt (len $artifacts) 1 -}}
{{- fail (printf "model.digest is one manifest's, and arms %s read several; give each its own as arms.NAME.model.digest." (values $artifacts | sortAlpha | join " and ")) -}}
{{- end -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail "ingress.enabled needs a name that it answers to; give ingress.hosts." -}}
{{- end -}}
{{- if and $values.ingress.enabled $values.tls.existingSecret (not (regexMatch "backend-protocol|server-ssl|serversscheme|app-protocols|upstream-protocol" (toJson (list $values.ingress.annotations $values.service.annotations)))) -}}
{{- fail "an Ingress speaks http to the arms unless an annotation asks for https, and tls.existingSecret makes them speak https; end TLS at the Ingress by ingress.tlsSecret instead, or give the annotation, such as nginx.ingress.kubernetes.io/backend-protocol: HTTPS." -}}
{{- end -}}
{{- if and (or $values.ingress.enabled $values.httpRoute.enabled) (eq (default "off" $values.settings.busy_wait) "anywhere") -}}
{{- fail "settings.busy_wait lets callers slow the arms down, and an Ingress or HTTPRoute brings strangers; leave it out." -}}
{{- end -}}
{{- if and $values.settings.tracing $values.networkPolicy.enabled (not $values.networkPolicy.egress) -}}
{{- fail "settings.tracing sends spans, and the NetworkPolicy lets nothing out but DNS; name the collector in networkPolicy.egress." -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs a Gateway; name it in httpRoute.parentRefs." -}}
{{- end -}}
{{- if and $values.httpRoute.enabled $values.tls.existingSecret (not $values.httpRoute.backendTls.enabled) -}}
{{- fail "httpRoute speaks http to the arms, and tls.existingSecret makes them speak https; end TLS at the Gateway instead, or set httpRoute.backendTls." -}}
{{- end -}}
{{- if and $values.httpRoute.enabled $values.httpRoute.backendTls.enabled (or (not $values.tls.existingSecret) (not $values.httpRoute.backendTls.hostname)) -}}
{{- fail "httpRoute.backendTls speaks https to the arms; give tls.existingSecret, and in httpRoute.backendTls.hostname the name that its certificate has." -}}
{{- end -}}
{{- if and $values.rollout (eq $values.rollout.strategy "RollingUpdate") (eq (toString $values.rollout.maxSurge | trimSuffix "%") "0") (eq (toString $values.rollout.maxUnavailable | trimSuffix "%") "0") -}}
{{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0, so no rollout could begin; raise one of them." -}}
{{- end -}}
{{- if $values.proof.enabled -}}{{- include "drbert.checkProof" . -}}{{- end -}}
{{- end -}}

{{- define "drbert.checkModel" -}}
{{- $model := include "drbert.model" . | fromYaml -}}
{{- $values := .root.Values -}}
{{- if and (eq $model.source "pvc") (not $model.pvc.claimName) -}}
{{- fail (printf "arm %s takes its model from a volume; give model.pvc.claimName." .name) -}}
{{- end -}}
{{- if eq $model.source "initContainer" -}}
{{- if not $model.initContainer.image -}}
{{- fail (printf "arm %s has its model brought by a container; give model.initContainer.image." .name) -}}
{{- end -}}
{{- if and $values.networkPolicy.enabled (not $values.networkPolicy.egress) -}}
{{- fail (printf "arm %s has its model brought by a container, and the NetworkPolicy lets nothing out but DNS; name the store in networkPolicy.egress." .name) -}}
{{- end -}}
{{- end -}}
{{- if eq $model.source "imageVolume" -}}
{{- if not $model.imageVolume.reference -}}
{{- fail (printf "arm %s takes its model from an image; give model.imageVolume.reference." .name) -}}
{{- end -}}
{{- if semverCompare "<1.31.0-0" .root.Capabilities.KubeVersion.Version -}}
{{- fail (printf "arm %s takes its model from an image, which Kubernetes %s cannot mount; it takes 1.35, or 1.31 with the feature gate ImageVolume, or model.source: initContainer." .name .root.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "drbert.checkProof" -}}
{{- $values := .Values -}}
{{- $reference := include "drbert.armOf" (dict "root" . "role" "reference" "chosen" "") -}}
{{- $candidate := include "drbert.armOf" (dict "root" . "role" "candidate" "chosen" $values.proof.candidate) -}}
{{- if $values.tls.existingSecret -}}
{{- fail "proof asks pods by their addresses, which no certificate names; measure a release without tls.existingSecret." -}}
{{- end -}}
{{- if and $values.apiKeys.existingSecret (not $values.proof.headersSecret) -}}
{{- fail "proof asks pods that want a key; give proof.headersSecret, a Secret whose key `headers` holds one, such as X-API-Key: KEY." -}}
{{- end -}}
{{- if and (eq $values.proof.delayBy "server") (ne (default "off" $values.settings.busy_wait) "anywhere") -}}
{{- fail "proof slows pods down now and then, to show that it would see a slower model; set settings.busy_wait: anywhere, or proof.delayBy: client." -}}
{{- end -}}
{{- if not (or $values.manageReplicas $values.autoscaling.hpa.enabled $values.autoscaling.keda.enabled) -}}
{{- fail "proof takes pods that are there from the start, and with manageReplicas: false the chart does not know how many; measure a release that sets replicas." -}}
{{- end -}}
{{- $wanted := mul 2 (int $values.proof.restarts) -}}
{{- range $name := list $reference $candidate -}}
{{- $pods := include "drbert.fewestPods" (dict "root" $ "arm" (get $values.arms $name)) | int -}}
{{- if lt $pods (int $wanted) -}}
{{- fail (printf "proof.restarts is %d, each of which takes two pods of an arm that no other takes, and arm %s has %d pods; give it %d." (int $values.proof.restarts) $name $pods (int $wanted)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The one arm that has a role, or the chosen one. */}}
{{- define "drbert.armOf" -}}
{{- $found := list -}}
{{- range $name, $arm := include "drbert.arms" .root | fromYaml -}}
{{- if and (eq $arm.role $.role) (or (not $.chosen) (eq $name $.chosen)) -}}{{- $found = append $found $name -}}{{- end -}}
{{- end -}}
{{- if ne (len $found) 1 -}}
{{- fail (printf "proof compares one reference with one candidate, and %d arms are a %s%s; %s." (len $found) .role (ternary (printf " called %s" .chosen) "" (ne .chosen "")) (ternary "give one arm that role" "name one in proof.candidate" (or (eq .role "reference") (eq (len $found) 0)))) -}}
{{- end -}}
{{- first $found -}}
{{- end -}}

{{/* Whether an arm is parked: the chart gives it no pods, and nobody else does. */}}
{{- define "drbert.isParked" -}}
{{- $values := .root.Values -}}
{{- $isScaled := or $values.autoscaling.hpa.enabled $values.autoscaling.keda.enabled -}}
{{- if and $values.manageReplicas (not $isScaled) (not .arm.madeByRollout) (eq (include "drbert.fewestPods" . | int) 0) -}}
yes
{{- end -}}
{{- end -}}

{{/* How many pods an arm has at least. */}}
{{- define "drbert.fewestPods" -}}
{{- $values := .root.Values -}}
{{- if .arm.madeByRollout -}}
0
{{- else if or $values.autoscaling.hpa.enabled $values.autoscaling.keda.enabled -}}
{{ int (include "drbert.ofArm" (dict "root" .root "arm" .arm "key" "autoscaling") | fromYaml).minReplicas }}
{{- else -}}
{{ int (ternary .arm.replicas $values.replicas (hasKey .arm "replicas")) }}
{{- end -}}
{{- end -}}

{{/* Whether the chart says how many pods an arm has; else an autoscaler or `kubectl scale` does. */}}
{{- define "drbert.ownsReplicas" -}}
{{- $values := .root.Values -}}
{{- $isScaled := or $values.autoscaling.hpa.enabled $values.autoscaling.keda.enabled -}}
{{- if or .arm.madeByRollout (and $values.manageReplicas (not $isScaled)) -}}
yes
{{- end -}}
{{- end -}}
